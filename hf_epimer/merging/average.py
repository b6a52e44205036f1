"""The weighted mean of one parameter, in pieces: for tensors that are large and no matrices to a method (embeddings).

W = W_0 + sum l_t (W_t - W_0)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.merging.finite import check_weights, stored_as
from hf_epimer.merging.inputs import Ingredients, normalized_weights
from hf_epimer.merging.report import LayerReport

PIECE = 2**22
"""Elements of a tensor that are worked on at a time."""


def average(
    ingredients: Ingredients,
    name: str,
    write: Callable[[Tensor, int], None],
    *,
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    exact: bool = False,
) -> LayerReport:
    """Merge one parameter by the mean.

    Args:
        write: takes every piece, flat, and the number of its first element.
        names: what the parameter is called in each model, where a model reads another one for it (tied weights).
        dtype: of the merged tensor; None for that of the base.
        exact: in float64.

    Raises:
        CheckpointError: NaN or Inf in an input (tensor named).
        NumericalError: the mean does not fit into `dtype`.
    """
    working = torch.float64 if exact else torch.float32
    base, models = ingredients.base, ingredients.models
    weights = normalized_weights(ingredients.weights, len(models))
    whole = [(base, name, base.tensor(name).flatten())]
    whole += [(model, own, model.tensor(own).flatten()) for model, own in zip(models, names or [name] * len(models))]
    squares = torch.zeros(2 + len(models), dtype=torch.float64)  # of the merged task vector, the base, the task vectors
    for start in range(0, whole[0][2].numel(), PIECE):
        first, *others = (_piece(*entry, start, working) for entry in whole)
        mean = torch.zeros_like(first)
        for number, (weight, other) in enumerate(zip(weights, others, strict=True), start=2):
            squares[number] += _square(other.sub_(first))
            mean.add_(other, alpha=weight)
        squares[0] += _square(mean)
        squares[1] += _square(first)
        write(stored_as(first + mean, dtype or whole[0][2].dtype, name), start)
    merged, of_base, *of_models = squares.sqrt().tolist()
    shape = tuple(base.shapes[name])
    return LayerReport(name, shape, merged_norm=merged, task_vector_norms=tuple(of_models), base_norm=of_base)


def _piece(source: TensorSource, name: str, values: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    piece = values[start : start + PIECE].to(dtype, copy=True)
    check_weights(piece, source.label, name)
    return piece


def _square(values: Tensor) -> float:
    return math.pow(float(torch.linalg.vector_norm(values)), 2)
