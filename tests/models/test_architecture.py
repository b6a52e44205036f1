"""The table of architectures: names in every layout, families by their config or by the names of their tensors."""

from __future__ import annotations

import pytest

from helpers.checkpoints import TINY
from hf_epimer.errors import CheckpointError
from hf_epimer.models import ARCHITECTURES, architecture_of, find_architecture, recognise
from hf_epimer.models.architecture import Architecture
from hf_epimer.models.clip import CLIP
from hf_epimer.models.dinov2 import DINOV2
from hf_epimer.models.siglip import SIGLIP

BIAS = "vision_model.post_layernorm.bias"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.tag)
def test_every_entry_describes_a_model_that_could_be_there(architecture: Architecture) -> None:
    config = architecture.vision_config({"model_type": architecture.output_type}, "nowhere")
    shapes = architecture.shapes(config)
    assert {architecture.canonical(name) for name in shapes} == set(shapes)
    assert {architecture.canonical(architecture.module_name(name)) for name in shapes} == set(shapes)
    inside = f"{architecture.prefix}{architecture.blocks}."
    assert {name.removeprefix(inside).split(".")[0] for name in shapes if name.startswith(inside)} == {
        str(number) for number in range(config[architecture.depth])
    }
    for residual in architecture.residuals:
        width = config[architecture.width]
        assert all(shapes[f"{inside}0.{layer}.weight"][1] == width for layer in residual.reads)
        assert shapes[f"{inside}0.{residual.writes}.weight"][0] == width
    assert all(known in config for known in architecture.known_by) and config[architecture.width] > 0


def test_a_name_is_canonical_in_every_layout() -> None:
    for name in (BIAS, "post_layernorm.bias", f"clip.{BIAS}", f"model.{BIAS}"):
        assert CLIP.canonical(name) == BIAS
    for name in ("text_model.embeddings.token_embedding.weight", "visual_projection.weight", "clip.logit_scale"):
        assert CLIP.canonical(name) is None
    for name in ("classifier.weight", "module.classifier.bias"):
        assert CLIP.canonical(name) is None and CLIP.is_classifier(name)
    assert CLIP.canonical("neck.weight") == "neck.weight"  # reported by who compares key sets
    assert CLIP.module_name(BIAS) == "post_layernorm.bias"


def test_a_family_is_found_by_its_config_or_by_most_of_its_names() -> None:
    assert find_architecture({"model_type": "clip"}, "here") is CLIP
    with pytest.raises(CheckpointError, match="here: model type 'bert' is of no family that is known here"):
        find_architecture({"model_type": "bert"}, "here")
    assert recognise(CLIP.shapes(TINY)) is CLIP
    assert recognise([BIAS, "something.else", "again.else"]) is CLIP
    assert recognise(["weight", "bias"]) is None


def test_a_kind_that_its_family_does_not_describe_is_of_no_family() -> None:
    assert architecture_of({"model_type": "dinov2"}) is DINOV2
    assert architecture_of({"model_type": "dinov2", "use_swiglu_ffn": True}).data_free
    assert architecture_of({"model_type": "siglip", "vision_config": {}}) is SIGLIP
    assert architecture_of({"model_type": "siglip", "vision_config": {"vision_use_head": False}}).data_free
