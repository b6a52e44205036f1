"""Statistics stored small, and read as if they were not.

half     a symmetric matrix by its upper triangle: n (n + 1) / 2 numbers under the same name
rank1    v ~ r c^T / mean(v) with r, c the means of the rows and columns of a matrix (and of a convolution seen as
         one), under `<name>.rows` and `<name>.columns`; about 0.3% of the size
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.methods.statistic import SYMMETRIC_SUFFIXES, split_name
from hf_epimer.numerics.packed import pack_symmetric, packed_side, unpack_symmetric
from hf_epimer.types import Shape

RANK_ONE_SUFFIXES = (".rows", ".columns")


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Statistics with the upper triangles of their symmetric matrices only."""
    return {
        name: pack_symmetric(value) if name.endswith(SYMMETRIC_SUFFIXES) and value.ndim == 2 else value
        for name, value in tensors.items()
    }


def means_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fisher information with the means of rows and columns instead of every matrix."""
    stored = {}
    for name, value in tensors.items():
        if value.ndim < 2:
            stored[name] = value.float()
        else:
            stored[f"{name}.rows"], stored[f"{name}.columns"] = rank_one(value)
    return stored


def expanded(stored: TensorSource, parameters: Mapping[str, Shape]) -> TensorSource:
    """A source that looks as if everything in it were stored in full; tensors are expanded as they are read.

    Args:
        parameters: name -> shape, by which a convolution stored by its means gets its shape back.
    """
    names = [name for name in stored.shapes if name not in parameters]
    small = any(
        name.endswith(RANK_ONE_SUFFIXES) or (name.endswith(SYMMETRIC_SUFFIXES) and len(stored.shapes[name]) == 1)
        for name in names
    )
    return _Expanded(stored, parameters) if small else stored


def rank_one(values: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the rows and of the columns of v seen as a matrix m x (the rest): lengths m and n."""
    matrix = values.flatten(1).float()
    return matrix.mean(1), matrix.mean(0)


def from_rank_one(rows: Tensor, columns: Tensor) -> Tensor:
    """r c^T / mean(r), m x n: the rank-one matrix with these means of rows and columns."""
    mean = rows.mean()
    return torch.outer(rows / mean, columns) if bool(mean > 0) else rows.new_zeros(len(rows), len(columns))


def split_stored_name(name: str) -> tuple[str, str]:
    """The name of a stored tensor as the parameter's name and what was added to it."""
    suffix = next((suffix for suffix in RANK_ONE_SUFFIXES if name.endswith(suffix)), "")
    return (name.removesuffix(suffix), suffix) if suffix else split_name(name)


class _Expanded:
    def __init__(self, stored: TensorSource, parameters: Mapping[str, Shape]) -> None:
        self.label = stored.label
        self.stored = stored
        self.shapes: dict[str, Shape] = {}
        for name, shape in stored.shapes.items():
            parameter = name.removesuffix(".rows")
            if name in parameters:
                self.shapes[name] = shape
            elif name.endswith(".columns"):
                continue
            elif parameter != name:
                factors = (*shape, *stored.shapes.get(f"{parameter}.columns", ()))
                full = tuple(parameters.get(parameter, factors))
                self.shapes[parameter] = full if factors == (full[0], math.prod(full[1:])) else factors
            elif name.endswith(SYMMETRIC_SUFFIXES):
                self.shapes[name] = _full(shape)
            else:
                self.shapes[name] = shape

    def tensor(self, name: str) -> Tensor:
        if name in self.stored.shapes:
            value = self.stored.tensor(name)
            return value if value.shape == self.shapes[name] else unpack_symmetric(value)
        rows, columns = self.stored.tensor(f"{name}.rows"), self.stored.tensor(f"{name}.columns")
        return from_rank_one(rows.float(), columns.float()).view(self.shapes[name])

    def copy_to(self, name: str, out: Tensor) -> None:
        out.copy_(self.tensor(name))


def _full(shape: Shape) -> Shape:
    """Of a matrix or of its triangle; what is neither stays as it is, for the comparison of shapes to name it."""
    try:
        return (packed_side(shape[0]),) * 2 if len(shape) == 1 else shape
    except ValueError:
        return shape
