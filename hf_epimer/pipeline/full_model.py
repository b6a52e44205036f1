"""`--full`: the merged vision tower in its base's whole model, with text tower, tokenizer and image processor.

transformers' pipeline("zero-shot-image-classification", ...) takes the folder as it stands. Everything but the tower is
the base's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_epimer.checkpoints.reader import Checkpoint
from hf_epimer.checkpoints.writer import write_json, write_tensors
from hf_epimer.errors import UsageError
from hf_epimer.merging.finite import check_weights, stored_as
from hf_epimer.merging.stream import MergedLayer
from hf_epimer.models.source import CONFIG, ModelSource
from hf_epimer.pipeline.any_architecture import copy_file
from hf_epimer.pipeline.plan import Plan

_OF_A_MACHINE = ("_name_or_path", "_commit_hash", "auto_map")
"""Keys of a config.json that say where it once lay, or bring code."""


def check_full(base: ModelSource, has_heads: bool) -> None:
    """Refuse what has no whole model to be written into.

    Raises:
        UsageError: the base has no text tower or no tokenizer, or the models were trained with classifiers.
    """
    zero_shot = base.architecture.zero_shot
    if zero_shot is None:
        raise UsageError(f"--full: a {base.architecture.name} has no text tower; leave it out")
    if has_heads:
        raise UsageError("--full: the models have classifiers of their own, which read the vision tower: leave it out")
    if not base.has_text_tower or not base.has_tokenizer:
        whole = zero_shot.model_class
        raise UsageError(f"--full: {base} has no text tower or no tokenizer: name a whole model ({whole}) with --base")


def write_full(folder: Path, plan: Plan, dtype: torch.dtype, layers: Iterable[MergedLayer]) -> None:
    """Write weights, config.json and tokenizer; the image processor is written as of any merge.

    Raises:
        CheckpointError: NaN or Inf in the rest of the base, or a file of its tokenizer that cannot be copied.
        NumericalError: a value of it does not fit into `dtype`.
    """
    base, zero_shot = plan.base, plan.architecture.zero_shot
    assert zero_shot
    rest = _rest_of(plan)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for layer in layers:
            yield layer.name, layer.tensor
        for name in rest.shapes:
            value = rest.tensor(name)
            check_weights(value, rest.label, name)
            yield name, stored_as(value, dtype, name)

    for name in sorted(zero_shot.files & base.files):
        copy_file(base, name, folder)
    write_tensors(folder, {**plan.shapes, **rest.shapes}, dtype, tensors())
    of_tensors = str(dtype).removeprefix("torch.")
    named = {"architectures": [zero_shot.model_class], "dtype": of_tensors, "torch_dtype": of_tensors}
    write_json(folder / CONFIG, _without_origin(base.config) | named)


def _rest_of(plan: Plan) -> Checkpoint:
    """What the base has beside its vision tower: parameters alone, no counters."""
    architecture = plan.architecture
    left_out = (*architecture.classifiers, "embeddings.position_ids", "text_model.embeddings.position_ids")

    def rest(name: str) -> str | None:
        unwrapped = architecture.unwrapped(name)
        return unwrapped if architecture.canonical(name) is None and not unwrapped.startswith(left_out) else None

    return Checkpoint(plan.base.label, [plan.base.fetch(name) for name in plan.base.weight_files], rest)


def _without_origin(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: _without_origin(value) for key, value in config.items() if key not in _OF_A_MACHINE}
