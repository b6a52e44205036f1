"""A diagnosis in words: every finding with the numbers that led to it. The rule stands at `verdict`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from hf_epimer.numerics.diagnostics import CurvatureDiagnosis, cosines
from hf_epimer.pipeline.doubts import SPIKED, spiked

HARDLY = 0.01
"""Share of the flat mean's spread below which eta counts as nothing; a convention, not a measured threshold."""

STEEPEST = 3.0
"""How many times the average of the others a task's curvature must be for the merge to lean on it."""

HALF = 0.5
"""Share of a task vector that a rank should keep."""

AGAINST = -0.1
"""Cosine below which two tasks point against each other: random directions of this size stay within .001."""


@dataclass(frozen=True)
class RankTotals:
    """The whole model at one rank.

    Attributes:
        capped: layers where floor(min(m, n) / T) is less than the rank.
        kept, singular: shares of every task's matrices, in [0, 1]; NaN for a task that changed none.
        curvature: summed over all parameters; None without Fisher information.
        isotropy: mean and largest deviation of a matrix.
        beside: the part of V_S that is of parameters which take the mean: biases, norms and other non-matrices.
    """

    rank: int
    capped: int
    kept: tuple[float, ...]
    singular: tuple[float, ...]
    curvature: CurvatureDiagnosis | None
    isotropy: tuple[float, float]
    beside: float = 0.0

    @property
    def least_kept(self) -> float:
        """Share of the task of which least is kept."""
        return min(filter(math.isfinite, self.kept), default=math.nan)

    @property
    def least_singular(self) -> float:
        """The same for the tasks' own directions."""
        return min(filter(math.isfinite, self.singular), default=math.nan)


def verdict(
    labels: Sequence[str], totals: Sequence[RankTotals], gram: Tensor, spikes: Sequence[float] = ()
) -> tuple[str, ...]:
    """Findings in words, the last one which method to take. The rule, with eta, V_S, R_S at the largest rank and summed
    over the model:

    1. eta below `HARDLY` of F(c_bar), the flat mean's spread: curvature hardly matters, whatever the metric does.
       Above it, but below once every H_t has the same trace: only the sizes of the tasks' curvatures act, as one weight
       per task and layer; mostly so where equal traces leave less than half. Else directions act too. eta is what the
       Fréchet mean saves of the second-order loss, so it bounds what there is to win; it promises no accuracy.
    2. A task whose curvature (l_t tr H_t) is more than `STEEPEST` times the average of the others pulls a merge that
       takes curvature at its own size; one of which `SPIKED` or more stands out among the others spoils most methods.
    3. R_S above the matrices' V_S: what the basis leaves out costs more than what the tasks disagree about within it.
       Then the rank with the smallest R_S is named if it is smaller by a tenth than at the largest rank; else a higher
       rank is advised if R_S has fallen by a tenth or more on the way there.
    4. The smallest rank from which on every task keeps `HALF` of its matrices; where no rank does, but the task's own
       directions would, whitening them against the other tasks' is what costs.
    5. Pairs of task vectors with a cosine below `AGAINST`.
    6. Which method: on every set that was measured (docs/results.md) calibration was best where there are images, and
       task vectors alone were the best data-free merge or within a point of it.

    Args:
        labels: of the models.
        totals: one entry per rank, ascending.
        gram: <D_s, D_t> of the whole model.
        spikes: share of every task vector that stands out; none known where empty.
    """
    last = totals[-1]
    words = []
    if last.curvature:
        words.append(_curvature_matters(last))
        words += _steepest(labels, last.curvature)
        words += _outside(totals)
    words += _energy_kept(labels, totals)
    standing_out = [f"{spiked(label, share)}." for label, share in zip(labels, spikes) if share >= SPIKED]
    return (*words, _directions(labels, gram), *standing_out, _WHICH_METHOD)


_WHICH_METHOD = (
    "To merge: with images of every task the plain command, which also mends what layers do to each other; without "
    "images by published statistics where there are any, else by the task vectors (--metric task-vectors)."
)


def _curvature_matters(last: RankTotals) -> str:
    assert last.curvature
    share, equal = last.curvature.share, last.curvature.share_trace
    numbers = f"at rank {last.rank} eta is {share:.1%} of the flat mean's spread"
    if not math.isfinite(last.isotropy[0]):
        return "Curvature has nothing to act on: no matrix was changed and has Fisher information that is not zero."
    isotropy = f"isotropy deviation {last.isotropy[0]:.2f} on average, {last.isotropy[1]:.2f} at most"
    if share < HARDLY:
        return f"EpiMer's curvature will hardly matter: {numbers}, {isotropy}. tsv-m should do as well as epimer."
    numbers += f", {equal:.1%} once every task's curvature has the same trace; {isotropy}."
    if equal < HARDLY:
        return f"Curvature acts only as one weight per task and layer: {numbers}"
    return f"Curvature can matter{', mostly as one weight per task and layer' if 2 * equal < share else ''}: {numbers}"


def _steepest(labels: Sequence[str], curvature: CurvatureDiagnosis) -> list[str]:
    total = math.fsum(curvature.traces)
    steepest = max(range(len(labels)), key=lambda task: curvature.traces[task])
    steep = curvature.traces[steepest]
    if steep * (len(labels) - 1) <= STEEPEST * (total - steep):
        return []
    return [
        f"{labels[steepest]} has {steep / total:.0%} of all curvature, so a merge to the paper's letter leans on it; "
        "the default (--normalize trace) gives every task the same say."
    ]


def _outside(totals: Sequence[RankTotals]) -> list[str]:
    known = {total.rank: total.curvature for total in totals if total.curvature}
    outside = {rank: at_rank.residual for rank, at_rank in known.items()}
    last = totals[-1].rank
    inside = known[last].variance - totals[-1].beside
    if outside[last] <= inside:
        return []
    best = min(outside, key=lambda rank: outside[rank])
    if len(outside) == 1:
        trend = ""
    elif outside[best] < 0.9 * outside[last]:
        trend = f"; rank {best} leaves out least (R_S {outside[best]:.2g})"
    elif outside[last] < 0.9 * outside[totals[0].rank]:
        trend = f"; R_S falls with rank ({outside[totals[0].rank]:.2g} at rank {totals[0].rank}), so try a higher one"
    else:
        trend = f"; rank makes little difference (R_S {outside[totals[0].rank]:.2g} at rank {totals[0].rank})"
    return [
        f"What rank {last} leaves out of the matrices costs more than what the tasks disagree about within it "
        f"(R_S {outside[last]:.2g}, V_S of the matrices {inside:.2g}){trend}."
    ]


def _energy_kept(labels: Sequence[str], totals: Sequence[RankTotals]) -> list[str]:
    lacking = [{task: kept for task, kept in zip(labels, total.kept) if kept < HALF} for total in totals]
    least = {task: kept for task, kept in zip(labels, totals[-1].kept) if math.isfinite(kept)}
    if not least:
        return []
    last = totals[-1]
    if lacking[-1]:
        worst = min(lacking[-1], key=lambda task: lacking[-1][task])
        alone = dict(zip(labels, last.singular))[worst]
        cost = f"; its own directions alone would keep {alone:.0%}, whitening costs the rest" if alone >= HALF else ""
        return [
            f"Even rank {last.rank} throws away more than half of {_some(lacking[-1])} ({_kept(worst, least)}{cost})."
        ]
    if not any(lacking):
        first = dict(zip(labels, totals[0].kept))
        worst = min(least, key=lambda task: first[task])
        return [f"Every rank keeps at least half of every task (rank {totals[0].rank}: {_kept(worst, first)})."]
    index = max(index for index, short in enumerate(lacking) if short)
    worst = min(lacking[index], key=lambda task: lacking[index][task])
    return [
        f"Ranks below {totals[index + 1].rank} throw away more than half of {_some(lacking[index])} "
        f"(rank {totals[index].rank}: {_kept(worst, lacking[index])})."
    ]


def _kept(task: str, kept: dict[str, float]) -> str:
    return f"{kept[task]:.0%} of {task} kept"


def _some(tasks: dict[str, float]) -> str:
    names = sorted(tasks, key=lambda task: tasks[task])
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _directions(labels: Sequence[str], gram: Tensor) -> str:
    cosine = cosines(gram)
    pairs = {(s, t): float(cosine[s, t]) for s, t in combinations(range(len(labels)), 2)}
    pairs = {pair: value for pair, value in pairs.items() if math.isfinite(value)}
    against = sorted((pair for pair in pairs if pairs[pair] < AGAINST), key=lambda pair: pairs[pair])
    if against:
        named = [f"{labels[s]} and {labels[t]} (cosine {pairs[s, t]:.2f})" for s, t in against[:3]]
        more = f" and {len(against) - 3} more pairs" if len(against) > 3 else ""
        return f"Tasks that point against each other: {', '.join(named)}{more}."
    if not pairs:
        return "No two task vectors can be compared: at most one is not zero."
    low, high = min(pairs.values()), max(pairs.values())
    numbers = f"cosines from {low:.2f} to {high:.2f}" if len(pairs) > 1 else f"cosine {low:.2f}"
    return f"No two tasks point against each other ({numbers})."
