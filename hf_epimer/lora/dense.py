"""A merged adapter as full weights, base + D, streamed as a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.lora.core_space import MergedUpdate
from hf_epimer.merging.finite import check_weights, stored_as
from hf_epimer.merging.report import LayerReport
from hf_epimer.merging.stream import MergedLayer
from hf_epimer.numerics.lowrank import LowRank


def fold_updates(
    updates: Iterable[MergedUpdate], base: TensorSource, dtype: torch.dtype | None = None
) -> Iterator[MergedLayer]:
    """Every parameter of the base, one at a time, plus what the merged adapter adds to it.

    Args:
        updates: in the order of the base, as `merge_adapters` gives them.
        dtype: of the merged tensors; None for that of the base.

    Raises:
        CheckpointError: NaN or Inf in the base.
        NumericalError: a sum does not fit into `dtype`.
    """
    pending = iter(updates)
    merged = next(pending, None)
    for name, shape in base.shapes.items():
        tensor = base.tensor(name)
        stored_dtype = dtype or tensor.dtype
        check_weights(tensor, base.label, name)
        report = LayerReport(name, shape, merged_norm=0.0)
        if merged is not None and merged.name == name:
            update = merged.update.dense().view(shape) if isinstance(merged.update, LowRank) else merged.update
            tensor, report = tensor.to(update.dtype) + update, merged.report
            merged = next(pending, None)
        yield MergedLayer(name, stored_as(tensor, stored_dtype, name), report)
