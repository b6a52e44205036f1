"""Means of low-rank matrices that respect how adapters are defined: B A = (B G)(G^{-1} A) for every invertible G.

Notation, beside that of `hf_epimer.numerics` (D_t = B_t A_t is the task vector of adapter t):

    B_t, A_t   factors, m x r_t and r_t x n, scaling included      U_t, S_t, V_t   thin SVD of B_t A_t: free of G
    Z_t        balanced factors [U_t S_t^1/2; V_t S_t^1/2]         M_t             core, D_t = U_ref M_t V_ref^T

    factors      a low-rank matrix by its thin SVD; the union core, in which adapters of any ranks live without loss
    chordal      the best rank-R matrix in the Frobenius norm                       truncated SVD of sum l_t D_t
    procrustes   balanced factors modulo rotations, (R^{(m+n) x r}) / O(r)          generalised Procrustes
    polar        subspaces and scales apart, (St x SPD x St) / O(r)                 Bonnabel and Sepulchre 2010
    riemannian   factors modulo GL(r) in the scale-free quotient metric             Mishra et al. 2014
    iteration    what the last three have in common: the start, when to stop, whether the mean is unique
    sylvester    the mean in the core under Kronecker curvature                     generalised Sylvester equation

Every mean is equivariant under isometries of both sides, so it is taken in the union core and lifted: no m x n matrix
is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from hf_epimer.numerics.lowrank.chordal import chordal_mean
from hf_epimer.numerics.lowrank.factors import (
    LowRank,
    LowRankMean,
    UnionCore,
    factorize,
    low_rank,
    outputs_core,
    union_core,
)
from hf_epimer.numerics.lowrank.iteration import iterated_mean
from hf_epimer.numerics.lowrank.polar import log_polar_iteration, polar_iteration
from hf_epimer.numerics.lowrank.procrustes import procrustes_iteration
from hf_epimer.numerics.lowrank.riemannian import riemannian_iteration

Mean = Callable[[Sequence[LowRank], Tensor, int | None], LowRankMean]

MEANS: dict[str, Mean] = {
    "chordal": chordal_mean,
    "procrustes": partial(iterated_mean, procrustes_iteration),
    "polar": partial(iterated_mean, polar_iteration),
    "log-polar": partial(iterated_mean, log_polar_iteration),
    "riemannian": partial(iterated_mean, riemannian_iteration),
}


def low_rank_mean(kind: str, points: Sequence[LowRank], weights: Tensor, rank: int | None = None) -> LowRankMean:
    """The mean of low-rank matrices, taken in their union core.

    A zero matrix is no point of a manifold of rank r: the mean is taken over the others and multiplied by their share
    of the weights, which is what the arithmetic mean does with it.

    Args:
        kind: a name from MEANS.
        points: D_1 .. D_T, one shape, any ranks.
        weights: l_t >= 0, length T, summing to 1.
        rank: of the mean; None for the largest it can have (`chordal`) or the largest of the points (the others).
    """
    present = [t for t, point in enumerate(points) if point.rank and float(weights[t]) > 0]
    if not present:
        return LowRankMean(points[0].truncated(0))
    share = weights[present].sum()
    core = union_core([points[t] for t in present])
    mean = MEANS[kind](core.points, weights[present] / share, rank)
    return mean.replaced(core.expand(mean.value).scaled(float(share)))


__all__ = [
    "MEANS",
    "LowRank",
    "LowRankMean",
    "UnionCore",
    "factorize",
    "low_rank",
    "low_rank_mean",
    "outputs_core",
    "union_core",
]
