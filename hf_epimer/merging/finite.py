"""NaN, Inf and numbers that a storage type does not have: found in one way, and said in one way wherever they arise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_epimer.errors import CheckpointError, NumericalError, StatisticsError


def is_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor Inf in it."""
    # a sum is finite unless an entry is not, or it overflows: one fast pass decides nearly always
    return math.isfinite(float(values.sum(dtype=torch.float32))) or bool(values.isfinite().all())


def check_weights(values: Tensor, label: str, name: str) -> None:
    """Refuse a stored tensor of a checkpoint or adapter.

    Raises:
        CheckpointError: naming the tensor.
    """
    if not is_finite(values):
        raise CheckpointError(f"{label}: NaN or Inf in {name}; its weights are damaged or diverged")


def check_statistics(values: Tensor, label: str, name: str) -> None:
    """Refuse a stored tensor of curvature statistics.

    Raises:
        StatisticsError: naming the tensor.
    """
    if not is_finite(values):
        raise StatisticsError(f"{label}: NaN or Inf in {name}")


def check_merged(values: Tensor, name: str, method: str) -> None:
    """Refuse what a method made of a layer.

    Raises:
        NumericalError: naming the layer.
    """
    if not is_finite(values):
        raise NumericalError(f"{name}: {method} gave NaN or Inf; try a larger --damping or --exact")


def stored_as(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Merged values in the type that they are written in.

    Raises:
        NumericalError: some of them do not fit into it.
    """
    stored = values.to(dtype)
    if not is_finite(stored):
        raise NumericalError(f"{name}: the merged values do not fit into {dtype}; choose another --dtype")
    return stored
