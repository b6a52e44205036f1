"""A checkpoint becomes a tower whatever its file calls the tensors, in every release of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.checkpoints import tiny_state, write_checkpoint
from hf_epimer.errors import CheckpointError
from hf_epimer.models.clip import CLIP
from hf_epimer.models.loading import load_tower
from hf_epimer.models.weights import parameters_of


@pytest.mark.parametrize("prefix", ["vision_model.", "", "clip.vision_model."])
def test_a_tower_has_the_weights_of_its_file(prefix: str, tmp_path: Path) -> None:
    state = tiny_state(1)
    half = {name: value.half() if "layers.1" in name else value for name, value in state.items()}
    other = {"visual_projection.weight": torch.ones(2, 2)}
    stored = {name.replace("vision_model.", prefix): value for name, value in half.items()} | other
    tower = load_tower(write_checkpoint(tmp_path / "a", stored))
    loaded = parameters_of(tower, CLIP)
    assert loaded.keys() == state.keys() and not tower.training
    for name, parameter in loaded.items():
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert torch.equal(parameter, half[name].float())
    with torch.no_grad():
        assert tower(pixel_values=torch.zeros(1, 3, 16, 16)).pooler_output.isfinite().all()


def test_no_tensor_of_a_tower_is_ever_made_up(tmp_path: Path) -> None:
    state = tiny_state(1)
    del state["vision_model.post_layernorm.weight"]
    with pytest.raises(CheckpointError, match=r"post_layernorm\.weight"):
        load_tower(write_checkpoint(tmp_path / "a", state))
