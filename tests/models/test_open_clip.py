"""OpenCLIP's layout: a random CLIPModel of transformers is written in it, and converted back it computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.command import Run, contents, fails
from helpers.open_clip import write_open_clip


@pytest.fixture
def checkpoint(clip_base: Path, tmp_path: Path) -> Path:
    """One that may be damaged."""
    return write_open_clip(tmp_path / "open-clip", clip_base)


def test_a_round_trip_computes_the_same(checkpoint: Path, clip_base: Path, tmp_path: Path, run: Run) -> None:
    code, _, complaint = run("convert", checkpoint, "--out", tmp_path / "out")
    assert (code, complaint) == (0, "")
    model, report = transformers.CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens, pixels = torch.tensor([[1, 5, 7, model.config.text_config.eos_token_id]]), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        ours = model.eval()(input_ids=tokens, pixel_values=pixels)
        theirs = transformers.CLIPModel.from_pretrained(clip_base).eval()(input_ids=tokens, pixel_values=pixels)
    torch.testing.assert_close(ours.logits_per_image, theirs.logits_per_image)
    assert set(contents(checkpoint)) - set(contents(tmp_path / "out")) == {
        p for p in contents(checkpoint) if "open_clip" in p
    }


def test_what_is_no_clip_of_transformers_is_refused(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    convert = ("convert", checkpoint, "--out", tmp_path / "out")
    file = checkpoint / "open_clip_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"visual.trunk.norm.weight": torch.ones(2)}, file)
    fails(run(*convert), r"visual\.trunk\.norm\.weight: transformers' CLIPModel has no such tensor")
    save_file(tensors | {"logit_scale": torch.tensor(torch.nan)}, file)
    fails(run(*convert), "NaN or Inf in logit_scale")
    (checkpoint / "open_clip_config.json").write_text(
        '{"model_cfg": {"embed_dim": 4, "vision_cfg": {}, "text_cfg": {}}}'
    )
    fails(run(*convert), "describes no CLIP with a vision transformer")
    file.unlink()
    fails(run(*convert), "there is no open_clip_model.safetensors or open_clip_pytorch_model.safetensors")
    assert contents(tmp_path) == ["open-clip"]
