"""What the means that are found by iteration have in common: where they start, when they stop, how it went.

Every one starts at the chordal mean of the largest rank of the points (or of a larger one that is asked for) and is
unique as long as all points lie within 45 degrees of it, the radius of convex balls of subspaces (Afsari 2011). A
smaller rank is not that of another manifold: the mean is taken there and truncated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_epimer.numerics.lowrank.chordal import chordal_mean
from hf_epimer.numerics.lowrank.factors import LowRank, LowRankMean, largest_angle

TOLERANCE = 1e-9
"""Change of a step, relative to the mean, at which it counts as standing still."""

MAX_STEPS = 500
"""After which it is given up: points at right angles make it crawl."""

CONVEX = torch.pi / 4


@dataclass(frozen=True)
class Reached:
    """Where an iteration ended.

    Attributes:
        value: the mean, not truncated.
        steps: how many.
        change: of the last step, relative to the mean.
        unique: False where the iteration itself knows of another place where it could have ended.
        note: what it did that the formula does not say.
    """

    value: LowRank
    steps: int
    change: float
    unique: bool = True
    note: str = ""


Iteration = Callable[[Sequence[LowRank], Tensor, LowRank], Reached]
"""Points D_1 .. D_T of one shape, none of them zero; weights that sum to 1; the start."""


def iterated_mean(
    iteration: Iteration, points: Sequence[LowRank], weights: Tensor, rank: int | None = None
) -> LowRankMean:
    """The mean to which an iteration leads from the chordal mean.

    Points that cancel each other get the chordal mean itself: D and -D have no mean of their rank that is closer to
    one than to the other, so every start would be arbitrary.

    Args:
        iteration: one of this folder.
        points: D_1 .. D_T of one shape, none of them zero.
        weights: l_t, length T, summing to 1.
        rank: of the mean, by default the largest of the points; below that the mean is taken there and truncated.
    """
    largest = max(point.rank for point in points)
    rank = rank or largest
    start = chordal_mean(points, weights, max(rank, largest)).value
    if start.rank < largest:
        note = "the adapters cancel each other in some directions: the chordal mean"
        return LowRankMean(start, angle=largest_angle(points, start), unique=False, note=note)
    reached = iteration(points, weights, start)
    angle = largest_angle(points, reached.value)
    notes = []
    if angle >= CONVEX:
        notes.append(f"up to {angle * 180 / torch.pi:.0f} degrees apart: the local mean reached from the chordal one")
    if not reached.change <= TOLERANCE:  # nor is NaN
        notes.append("stopped at the limit of steps")
    if reached.note:
        notes.append(reached.note)
    unique = reached.unique and angle < CONVEX
    value = reached.value.truncated(rank)
    return LowRankMean(value, reached.steps, reached.change, angle, unique, "; ".join(notes))
