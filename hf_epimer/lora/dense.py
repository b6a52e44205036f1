"""A merged adapter as full weights, base + D: in memory as an adapter of its own, or streamed as a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hf_epimer.checkpoints.reader import StateDict, TensorSource
from hf_epimer.lora.adapter import ROOT, Adapter
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


def adapter_of(updates: Iterable[MergedUpdate], base: TensorSource, label: str = "merged") -> Adapter:
    """The merged adapter in memory: a checkpoint (base + D) for a full merged model, or to be merged again."""
    stored: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for merged in updates:
        if isinstance(merged.update, Tensor):
            stored[ROOT + merged.name] = base.tensor(merged.name).float() + merged.update
        elif merged.update.rank:
            module = merged.name.removesuffix(".weight")
            b, a = merged.update.balanced()
            stored[f"{ROOT}{module}.lora_A.weight"] = a.reshape(len(a), *merged.shape[1:])
            stored[f"{ROOT}{module}.lora_B.weight"] = b
            ranks[f"^{module}"] = merged.update.rank
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": ranks}
    return Adapter(label, config, StateDict(label, stored), base)
