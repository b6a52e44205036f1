"""Merging modules and state dicts in memory, by a method's config: what `EpiMerConfig(...).merge(...)` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from hf_epimer.merging.compact import split_stored_name
from hf_epimer.merging.state_dicts import merge_state_dicts
from hf_epimer.methods import method_of
from hf_epimer.methods.base import MethodConfig
from hf_epimer.models import recognise


def merge_models(
    base: nn.Module | Mapping[str, Tensor],
    tuned: Sequence[nn.Module | Mapping[str, Tensor]],
    config: MethodConfig,
    statistics: Sequence[Mapping[str, Tensor] | str | Path] | None = None,
) -> dict[str, Tensor]:
    """As `merge_state_dicts`, by the method that `config` belongs to, for modules, state dicts and statistics files.

    Tensors are matched by the names they have on disk, whatever the installed transformers calls them in memory.
    """
    method = method_of(config)
    target = _tensors(base)
    architecture = recognise(target)
    canonical = architecture.canonical if architecture else lambda name: name
    names = {canonical(name) or name: name for name in target}  # canonical -> in the base

    def in_the_base(name: str) -> str:
        parameter, suffix = split_stored_name(name)
        known = canonical(parameter) or parameter
        return names.get(known, known) + suffix

    aligned = [{in_the_base(name): value for name, value in _tensors(model).items()} for model in tuned]
    measured = None
    if statistics is not None:
        measured = [{in_the_base(name): value for name, value in _statistics(entry).items()} for entry in statistics]
    return merge_state_dicts(target, aligned, method.name, config, measured)


def _tensors(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return model.state_dict() if isinstance(model, nn.Module) else model


def _statistics(entry: Any) -> Mapping[str, Tensor]:
    return entry if isinstance(entry, Mapping) else load_file(entry)
