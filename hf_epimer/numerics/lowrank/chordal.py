"""The chordal mean: the best matrix of rank R for straight-line distances in the space of all matrices.

    argmin_{rank X <= R} sum l_t ||X - B_t A_t||^2 = the R leading singular triples of sum l_t B_t A_t  (Eckart, Young)

By thin QR of the stacked factors [l_1 B_1 .. l_T B_T] and [A_1; ..; A_T] and an SVD of the (sum r_t) core. Unique
where the spectrum has a gap after R.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_epimer.numerics.lowrank.factors import LowRank, LowRankMean, largest_angle, low_rank, rounding

_GAP = 1e-9
"""Gap in the spectrum, relative to the largest singular value, below which two triples cannot be told apart."""


def chordal_mean(points: Sequence[LowRank], weights: Tensor, rank: int | None = None) -> LowRankMean:
    """The truncated mean.

    Args:
        points: D_1 .. D_T of one shape.
        weights: l_t, length T.
        rank: R; None for the whole mean, whose rank is at most min(sum r_t, m, n).
    """
    left = torch.cat([w * (x.u * x.s) for w, x in zip(weights, points, strict=True)], dim=1)
    right = torch.cat([x.v for x in points], dim=1)
    whole = low_rank(left, right.mT)
    # rounding is that of the terms, which may cancel, not that of their sum
    largest = max(float(w * x.s[0]) for w, x in zip(weights, points, strict=True) if x.rank)
    whole = whole.truncated(int((whole.s > rounding(left) * largest).sum()))
    if rank is None or rank >= whole.rank:
        return LowRankMean(whole, angle=largest_angle(points, whole))
    value = whole.truncated(rank)
    unique = bool(whole.s[rank - 1] - whole.s[rank] > _GAP * whole.s[0])
    note = "" if unique else f"singular values {rank} and {rank + 1} of the mean are equal: one of them was kept"
    return LowRankMean(value, angle=largest_angle(points, value), unique=unique, note=note)
