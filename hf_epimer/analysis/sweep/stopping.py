"""Settings that a part of the images shows to be hopeless, so that the other images need not be shown to them.

With h = 1 for a hit and 0 for a miss, B the best setting of the same method by the criterion, T tasks of n_t images,
and d = h_B - h on one image:

    average   mean over t of (sum of d) / n_t > 3 error,   error = sqrt(sum over t of (sum of d^2) / n_t^2) / T
    worst     the same of the worst task alone, where B has the same one; where B's is t and the setting's is u,
              a_t - a_u > 3 error,   error = sqrt(p (1 - p) (1/n_t + 1/n_u)),   p = (a_t + a_u) / 2

A setting is hopeless if it is behind by both. Errors are those of two settings that are equally good (McNemar,
Psychometrika 1947), which guards small data: nine images that the two see differently never suffice for `average`.

Why so for `worst`: a setting's lowest accuracy is at most the one it has on its present worst task, whatever the other
tasks give. B is held to its own worst task, too: to be better where the setting is bad counts for nothing if B is as
bad elsewhere. Two tasks have no images in common, so nothing is paired there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from torch import Tensor

from hf_epimer.analysis.sweep.grid import Setting
from hf_epimer.analysis.sweep.report import Row, best_rows
from hf_epimer.evaluation.results import TaskResult

SHARES = (0.25, 0.5)
"""Of every task's images, after which hopeless settings are stopped."""

ERRORS = 3.0
"""Standard errors of the difference that a setting is allowed to be behind."""

Hits = Mapping[str, Tensor]
"""Task -> which of its images one setting gets right: bool [n], the same images for all settings."""


def row_of(setting: Setting, hits: Hits, *, stopped: bool = False) -> Row:
    """The accuracies of one setting on the images that it was shown."""
    results = {name: TaskResult(int(right.sum()), len(right)) for name, right in hits.items()}
    return Row(setting, results, stopped)


def hopeless(hits: Mapping[Setting, Hits]) -> list[Setting]:
    """The settings that will not be the best of their method, neither on average nor by worst task."""
    rows = [row_of(setting, right) for setting, right in hits.items()]
    best = best_rows(rows)
    found = []
    for row in rows:
        by_average, by_worst = (best[row.setting.method][criterion] for criterion in ("average", "worst"))
        if _is_behind_on_average(hits[by_average.setting], hits[row.setting]) and _is_behind_by_worst(
            hits[by_worst.setting], by_worst, hits[row.setting], row
        ):
            found.append(row.setting)
    return found


def _is_behind_on_average(best: Hits, other: Hits) -> bool:
    apart = {name: best[name].float() - right.float() for name, right in other.items()}
    behind = fmean(float(difference.mean()) for difference in apart.values())
    squares = math.fsum(float(difference.square().sum()) / len(difference) ** 2 for difference in apart.values())
    return behind > ERRORS * math.sqrt(squares) / len(apart)


def _is_behind_by_worst(best: Hits, row_of_best: Row, other: Hits, row: Row) -> bool:
    task = row.worst_task
    if task == row_of_best.worst_task:
        return _is_behind_on_average({task: best[task]}, {task: other[task]})
    p = (row_of_best.worst + row.worst) / 2
    variance = p * (1 - p) * (1 / len(best[row_of_best.worst_task]) + 1 / len(other[task]))
    return row_of_best.worst - row.worst > ERRORS * math.sqrt(variance)
