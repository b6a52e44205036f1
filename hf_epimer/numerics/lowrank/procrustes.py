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

from hf_epimer.numerics.lowrank.factors import LowRank, aligning, low_rank, padded
from hf_epimer.numerics.lowrank.iteration import MAX_STEPS, TOLERANCE, Reached


def procrustes_iteration(points: Sequence[LowRank], weights: Tensor, start: LowRank) -> Reached:
    """Generalised Procrustes analysis until Z stands still."""
    z_t = padded([_stacked(point) for point in points])
    z = _stacked(start)
    steps, change = 0, torch.inf
    while steps < MAX_STEPS and change > TOLERANCE:
        following = torch.einsum("t,tij->ij", weights, z_t @ aligning(z_t.mT @ z))
        change = float((following - z).norm() / following.norm().clamp_min(torch.finfo(z.dtype).tiny))
        z = following
        steps += 1
    rows = points[0].shape[0]
    return Reached(low_rank(z[:rows], z[rows:].mT), steps, change)


def _stacked(point: LowRank) -> Tensor:
    b, a = point.balanced()
    return torch.cat([b, a.mT])
