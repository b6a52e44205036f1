"""Symmetric matrices by their upper triangle."""

from __future__ import annotations

import pytest
import torch

from hf_epimer.numerics.packed import pack_symmetric, packed_side, unpack_symmetric


@pytest.mark.parametrize("side", [1, 2, 7])
def test_a_triangle_holds_the_whole_matrix(side: int) -> None:
    x = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    matrix = x + x.mT
    packed = pack_symmetric(matrix)
    assert packed.shape == (side * (side + 1) // 2,)
    assert torch.equal(unpack_symmetric(packed), matrix)
    assert torch.equal(unpack_symmetric(packed.bfloat16()), matrix.bfloat16())


def test_rows_follow_each_other() -> None:
    matrix = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    assert pack_symmetric(matrix).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("length", [2, 4, 5, 9, 11])
def test_other_lengths_are_no_triangle(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} numbers are no triangle"):
        packed_side(length)
