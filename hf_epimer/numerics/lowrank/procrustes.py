"""The Procrustes mean: balanced factors modulo rotations, R^{(m+n) x r} / O(r).

    Z_t = [U_t S_t^1/2; V_t S_t^1/2],  d(Z, Z_t) = min_{O^T O = I} ||Z - Z_t O||,  O_t = polar(Z_t^T Z)
    Z <- sum l_t Z_t O_t until it stands still (generalised Procrustes analysis; the sum of squares never grows)

Balancing takes GL(r) down to O(r). Adapters of lower rank get columns of zeros, which no rotation can tell apart. The
iteration starts at the chordal mean and takes plain steps: every iterate is itself free of G, so that stopping early,
as far adapters make one do, costs accuracy but no invariance. Extrapolated steps would amplify rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_epimer.numerics.lowrank.chordal import chordal_start
from hf_epimer.numerics.lowrank.factors import LowRank, LowRankMean, aligning, low_rank, padded, verdict


def procrustes_mean(
    points: Sequence[LowRank],
    weights: Tensor,
    rank: int | None = None,
    *,
    tolerance: float = 1e-9,
    max_steps: int = 500,
) -> LowRankMean:
    """Generalised Procrustes analysis.

    Args:
        points: D_1 .. D_T of one shape, none of them zero.
        weights: l_t, length T, summing to 1.
        rank: of the mean, by default the largest of the points; below that the mean is taken there and truncated.
        tolerance: relative change of Z at which it counts as standing still.
        max_steps: after which it is given up.
    """
    largest = max(point.rank for point in points)
    columns = max(rank or largest, largest)
    start, cancelled = chordal_start(points, weights, columns)
    if cancelled:
        return cancelled
    z_t = padded([_stacked(point) for point in points], largest)
    z = padded([_stacked(start)], columns)[0]
    steps, change = 0, torch.inf
    while steps < max_steps and change > tolerance:
        following = torch.einsum("t,tij->ij", weights, z_t @ aligning(z_t.mT @ z))
        change = float((following - z).norm() / following.norm().clamp_min(torch.finfo(z.dtype).tiny))
        z = following
        steps += 1
    rows = points[0].shape[0]
    value = low_rank(z[:rows], z[rows:].mT)
    angle, unique, note = verdict(points, value, change <= tolerance)
    return LowRankMean(value.truncated(rank or columns), steps, change, angle, unique, note)


def _stacked(point: LowRank) -> Tensor:
    b, a = point.balanced()
    return torch.cat([b, a.mT])
