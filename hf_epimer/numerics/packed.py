"""Symmetric matrices by their upper triangle: n (n + 1) / 2 numbers, row after row."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor


def pack_symmetric(matrix: Tensor) -> Tensor:
    """The upper triangle of an n x n matrix, row after row, length n (n + 1) / 2."""
    return matrix[_upper(len(matrix), matrix.device)]


def unpack_symmetric(packed: Tensor) -> Tensor:
    """The symmetric n x n matrix of an upper triangle.

    Raises:
        ValueError: no matrix has a triangle of this length.
    """
    upper = packed.new_zeros(packed_side(len(packed)), packed_side(len(packed)))
    upper[_upper(len(upper), packed.device)] = packed
    return upper + upper.triu(1).mT


def packed_side(length: int) -> int:
    """n of a triangle of `length` numbers.

    Raises:
        ValueError: there is none.
    """
    side = (isqrt(8 * length + 1) - 1) // 2
    if side * (side + 1) // 2 != length:
        raise ValueError(f"{length} numbers are no triangle of a matrix")
    return side


def _upper(side: int, device: torch.device) -> Tensor:
    return torch.ones(side, side, dtype=torch.bool, device=device).triu()
