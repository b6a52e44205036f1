"""What an architecture is, as data, and how a checkpoint becomes a model: files, base, weights, heads.

ARCHITECTURES is the table of families; a new one is a file beside `clip.py` and a line here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hf_epimer.errors import CheckpointError
from hf_epimer.models.any_architecture import architecture_of_none
from hf_epimer.models.architecture import Architecture
from hf_epimer.models.clip import CLIP
from hf_epimer.models.deit import DEIT
from hf_epimer.models.dinov2 import DINOV2, DINOV2_WITH_REGISTERS
from hf_epimer.models.dinov3 import DINOV3
from hf_epimer.models.siglip import SIGLIP
from hf_epimer.models.vit import VIT

ARCHITECTURES: tuple[Architecture, ...] = (CLIP, SIGLIP, VIT, DEIT, DINOV2, DINOV2_WITH_REGISTERS, DINOV3)


def find_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """The family of a model, by the `model_type` in its config.json.

    Args:
        where: how messages name the model.

    Raises:
        CheckpointError: there is no such family here.
    """
    model_type = str(config.get("model_type"))
    for architecture in ARCHITECTURES:
        if model_type in architecture.model_types:
            return architecture
    known = ", ".join(sorted(model_type for architecture in ARCHITECTURES for model_type in architecture.model_types))
    raise CheckpointError(f"{where}: model type {model_type!r} is of no family that is known here ({known} are)")


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The family of a model; of one that no family here describes, what little can be said."""
    known = {model_type: family for family in ARCHITECTURES for model_type in family.model_types}
    family = known.get(str(config.get("model_type")))
    return family if family and family.supports(config) else architecture_of_none(config)


def recognise(names: Iterable[str]) -> Architecture | None:
    """The family to which most of these names of tensors belong; None where none belongs to any."""
    names = list(names)

    def belonging(architecture: Architecture) -> int:
        return sum(architecture.owns(name) for name in names)

    best = max(ARCHITECTURES, key=belonging)
    return best if belonging(best) else None
