"""Products of large matrices in float32, on processors whose BLAS leaves half of them idle.

torch multiplies dense matrices through its BLAS, which on processors of some makers does not use AVX-512; oneDNN, which
torch brings along for tensors in its own layout, does. Twice as fast there, about as fast elsewhere, and as precise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

_LARGE = 2**21
"""Multiplications from which on the change of layout is small beside the product."""

_BLOCK = 512
"""Rows of a symmetric product that are multiplied at a time."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """A B.

    Args:
        a: m x n.
        b: n x p; the transpose of a contiguous matrix is read as it lies.

    Returns:
        m x p.
    """
    if a.numel() * b.shape[1] < _LARGE or not by_onednn(a):
        return a @ b
    return linear(a.to_mkldnn(), b.mT.contiguous()).to_dense()


def add_symmetric(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """Add scale A B, known to be symmetric, to the blocks of `total` on and above its diagonal: half the work.

    Args:
        total: n x n; complete after `mirror`.
        a: n x N.
        b: N x n.
    """
    left, right = a.contiguous(), b.mT.contiguous()
    for start in range(0, len(total), _BLOCK):
        rows = slice(start, start + _BLOCK)
        total[rows, start:].add_(product(left[rows], right[start:].mT), alpha=scale)


def mirror(total: Tensor) -> Tensor:
    """Copy the blocks above the diagonal of a sum of `add_symmetric` below it; returns it."""
    for start in range(0, len(total), _BLOCK):
        rows = slice(start, start + _BLOCK)
        total[start + _BLOCK :, rows] = total[rows, start + _BLOCK :].mT
    return total


def by_onednn(like: Tensor) -> bool:
    """Whether large products of such tensors are left to oneDNN."""
    return (
        like.dtype == torch.float32
        and like.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16, and so faster than in float32; others emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tells = device.type == "cpu" and hasattr(torch.cpu, "get_capabilities")  # older torch does not
    return tells and bool(torch.cpu.get_capabilities().get("avx512_bf16"))
