"""What a method says of one layer beside the merged task vector: which directions it took, how its solve went.

Every field is None where it has no meaning.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankReport:
    """Directions that span a layer's merge.

    Attributes:
        rank: per task, k_l.
        capped: whether that is less than was asked for: floor(min(m, n) / T) bounds it.
        atoms: of the tagged basis, at most T k_l.
        common: taken from the summed task vectors (`iso-cts`).
        specific: taken from each task beside those.
        spikes: the share of every task vector's square that stands out among the tasks; `epimer-core` cuts it off.
    """

    rank: int | None = None
    capped: bool | None = None
    atoms: int | None = None
    common: int | None = None
    specific: int | None = None
    spikes: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SolveReport:
    """How one layer's equation was solved.

    Attributes:
        eta: curvature heterogeneity of the tasks.
        curvature: l_t tr H_t of every task, where they were left at their own sizes.
        flat: whether no task has any curvature here, so that the plain mean was taken.
        singular: whether the system has no unique solution, so that the plain mean was taken.
        steps: of the iteration.
        residual: relative, where the iteration ended.
        condition: an estimate of the system's condition number.
        angle: the largest principal angle between two adapters, in radians.
        unique: whether the mean is known to be the only one.
        note: what else is to be said, in words.
    """

    eta: float | None = None
    curvature: tuple[float, ...] | None = None
    flat: bool | None = None
    singular: bool | None = None
    steps: int | None = None
    residual: float | None = None
    condition: float | None = None
    angle: float | None = None
    unique: bool | None = None
    note: str | None = None
