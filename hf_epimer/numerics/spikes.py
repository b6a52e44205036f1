"""Task vectors whose leading directions are out of proportion, cut down to what is usual among the tasks of a merge.

    s_i of D_t is cut to   c |D_t| median over tasks of (s_i / |D|),   i = 1 .. `LEADING`

of two tasks the flatter one stands for the median, which would be half the spike.

A two-class or an early stopped checkpoint moves every layer along one direction that the inputs of all tasks share; in
a merge that direction overrides theirs. It shows in the shape of the spectrum, not in any norm or condition number,
which is why spectra are compared at length 1. One task alone, and equal ones, are left as they are for any c >= 1, and
so is a task vector that has these directions only, as an adapter of low rank has.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_epimer.numerics.linalg import truncated_svd

LEADING = 8
"""Directions looked at: spikes are few, and a truncated decomposition is far cheaper than a full one."""

COMPLETE = 0.995
"""Share of a task vector's norm in these directions from which on it counts as having no others."""


def without_spikes(task_vectors: Tensor, c: float, *, exact: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cut what stands out.

    Args:
        task_vectors: D_t, T x m x n; left as they are.
        c: how many times the median a singular value may be, >= 1.
        exact, seed: of the singular value decompositions.

    Returns:
        The task vectors, cut, or as they are where nothing stands out; and the share of |D_t|^2 that is gone, length T.
    """
    norms = torch.linalg.vector_norm(task_vectors, dim=(1, 2))
    gone = torch.zeros_like(norms)
    k = min(LEADING, *task_vectors.shape[1:])
    found = {
        t: truncated_svd(task_vectors[t], k, tolerance=1e-2, exact=exact, seed=seed)
        for t in norms.nonzero().flatten().tolist()
    }
    excesses = _excess({t: svd.s for t, svd in found.items()}, norms, c)
    cut = task_vectors.clone() if excesses else task_vectors
    for t, excess in excesses.items():
        u, s, v = found[t]
        cut[t] -= (u * excess) @ v.mT
        gone[t] = _share(s, excess, norms[t])
    return cut, gone


def spiked_shares(spectra: Mapping[int, Tensor], norms: Tensor, c: float) -> Tensor:
    """The share of |D_t|^2 that `without_spikes` would cut, length T, where singular values are known already.

    Args:
        spectra: task -> its leading singular values, in descending order.
        norms: |D_t|, length T.
        c: as above.
    """
    k = min([LEADING, *map(len, spectra.values())])
    leading = {t: s[:k].to(norms) for t, s in spectra.items()}
    shares = torch.zeros_like(norms)
    for t, excess in _excess(leading, norms, c).items():
        shares[t] = _share(leading[t], excess, norms[t])
    return shares


def _excess(leading: Mapping[int, Tensor], norms: Tensor, c: float) -> dict[int, Tensor]:
    """How far singular values exceed what is usual, for the tasks with some that do."""
    there = [t for t, s in leading.items() if bool(s.norm() < COMPLETE * norms[t])]
    if len(there) < 2:
        return {}
    shapes = torch.stack([leading[t] / norms[t] for t in there])
    usual = shapes[shapes.norm(dim=1).argmin()] if len(there) == 2 else shapes.quantile(0.5, dim=0)
    excess = {t: (leading[t] - c * usual * norms[t]).clamp_min(0) for t in there}
    return {t: values for t, values in excess.items() if bool(values.any())}


def _share(s: Tensor, excess: Tensor, norm: Tensor) -> Tensor:
    return (s.square() - (s - excess).square()).sum() / norm.square()
