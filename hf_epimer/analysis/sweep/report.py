"""What a sweep found, and which settings are best.

best by average: the largest mean over tasks of the accuracy; best by worst task: the largest minimum over tasks. Ties
go to the other criterion, then to the smaller rank and alpha. Both look at validation rows only, and at
settings that were shown all images: of the others a sweep has seen enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_epimer.analysis.sweep.grid import Setting
from hf_epimer.evaluation.results import TaskResult

FORMAT = "hf-epimer.sweep/1"
REPORT = "sweep.json"
CRITERIA = ("average", "worst")


@dataclass(frozen=True, eq=False)
class Row:
    """One setting, measured: task -> accuracy; `stopped` on a part of the images, as hopeless."""

    setting: Setting
    tasks: Mapping[str, TaskResult]
    stopped: bool = False

    @property
    def images(self) -> int:
        """How many it was shown."""
        return sum(result.samples for result in self.tasks.values())

    @property
    def average(self) -> float:
        """Mean accuracy over the tasks."""
        return fmean(result.accuracy for result in self.tasks.values())

    @property
    def error(self) -> float:
        """One standard error of the average: sqrt(sum p (1 - p) / n) / T."""
        variances = [result.accuracy * (1 - result.accuracy) / result.samples for result in self.tasks.values()]
        return math.sqrt(math.fsum(variances)) / len(variances)

    @property
    def worst_task(self) -> str:
        """The task with the lowest accuracy."""
        return min(self.tasks, key=lambda name: self.tasks[name].accuracy)

    @property
    def worst(self) -> float:
        """The lowest accuracy."""
        return self.tasks[self.worst_task].accuracy

    def to_json(self) -> dict[str, Any]:
        """As in results.json, with the setting."""
        return {
            **asdict(self.setting),
            "tasks": {name: {"accuracy": result.accuracy, **vars(result)} for name, result in self.tasks.items()},
            "average": self.average,
            "standard_error": self.error,
            "worst": {"task": self.worst_task, "accuracy": self.worst},
            **({"stopped": True} if self.stopped else {}),
        }


@dataclass(frozen=True)
class SweepReport:
    """What was tried and what is best; `sweep.json` is its JSON.

    Attributes:
        base, models: pinned references.
        weights: l_t.
        statistics: labels of what was read or estimated.
        methods: name -> its options, but for rank and alpha.
        ranks, alphas: of the grid, ascending.
        seed: of the samples and of everything random.
        splits: task -> the split that validation samples come from, and how many rows of its permutation precede them.
        rows: every setting, measured on validation samples.
        best: method -> criterion -> row, chosen among `rows`.
        test: the chosen settings on the test splits; empty unless asked for.
        commands: chosen setting -> the words that merge with it.
        seconds: per stage.
        out: the folder.
        stop_hopeless: whether hopeless settings were stopped on a part of the samples.
        pictures: names of the files in it; none where matplotlib is missing.
    """

    base: str
    models: tuple[str, ...]
    weights: tuple[float, ...]
    statistics: tuple[str, ...]
    methods: dict[str, dict[str, Any]]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    seed: int
    splits: dict[str, tuple[str, int]]
    rows: tuple[Row, ...]
    best: dict[str, dict[str, Row]]
    test: tuple[Row, ...]
    commands: dict[Setting, str]
    seconds: dict[str, float]
    out: Path
    stop_hopeless: bool = False
    pictures: tuple[str, ...] = ()

    def winner(self, criterion: str) -> Row:
        """The best setting of all methods by `average` or by `worst` task."""
        return best_row([chosen[criterion] for chosen in self.best.values()], criterion)

    @property
    def samples(self) -> dict[str, int]:
        """Task -> validation images."""
        return {name: result.samples for name, result in self.winner("average").tasks.items()}

    @property
    def stopped(self) -> tuple[Row, ...]:
        """The settings that were not shown all of them."""
        return tuple(row for row in self.rows if row.stopped)

    @property
    def spared(self) -> float:
        """The share of all settings on all images that was not looked at."""
        return 1 - sum(row.images for row in self.rows) / (len(self.rows) * sum(self.samples.values()))

    def choices(self, method: str) -> dict[Row, str]:
        """The chosen rows of a method, and by what: one row where both criteria agree."""
        by_average, by_worst = (self.best[method][criterion] for criterion in CRITERIA)
        return {by_average: "both"} if by_average is by_worst else {by_average: "average", by_worst: "worst task"}

    def at_edge(self, row: Row) -> bool:
        """Whether the alpha is the first or last of the grid, beyond which nothing was tried."""
        return row.setting.alpha is not None and row.setting.alpha in (self.alphas[0], self.alphas[-1])

    def tested(self, setting: Setting) -> Row | None:
        """A chosen setting on the test splits."""
        return next((row for row in self.test if row.setting == setting), None)

    def to_json(self) -> dict[str, Any]:
        """Everything but where it went."""
        return {
            "format": FORMAT,
            "base": self.base,
            "models": list(self.models),
            "weights": list(self.weights),
            "statistics": list(self.statistics),
            "methods": self.methods,
            "ranks": list(self.ranks),
            "alphas": list(self.alphas),
            "chosen_on": {
                "what": "validation: the end of the seeded permutation of the training split",
                "seed": self.seed,
                "tasks": {
                    name: {"split": split, "rows_before": before, "samples": self.samples[name]}
                    for name, (split, before) in self.splits.items()
                },
            },
            "best": {
                criterion: {
                    **self.winner(criterion).to_json(),
                    "command": self.commands[self.winner(criterion).setting],
                }
                for criterion in CRITERIA
            },
            "best_of_method": {
                name: {
                    criterion: {**row.to_json(), "at_edge": self.at_edge(row), "command": self.commands[row.setting]}
                    for criterion, row in chosen.items()
                }
                for name, chosen in self.best.items()
            },
            "test": [row.to_json() for row in self.test] or None,
            **({"stopped": {"settings": len(self.stopped), "spared": self.spared}} if self.stop_hopeless else {}),
            "results": [row.to_json() for row in self.rows],
            "seconds": self.seconds,
        }


def best_row(rows: Sequence[Row], criterion: str) -> Row:
    """The best of some rows that were shown the same images; of equal ones the first."""
    other = next(name for name in CRITERIA if name != criterion)
    # rounded: (0.7 + 0.6) / 2 is a little less than (0.9 + 0.4) / 2
    return max(rows, key=lambda row: (round(getattr(row, criterion), 9), round(getattr(row, other), 9)))


def best_rows(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Method -> criterion -> its best row."""
    measured: dict[str, list[Row]] = {}
    for row in rows:
        if not row.stopped:
            measured.setdefault(row.setting.method, []).append(row)
    return {name: {criterion: best_row(own, criterion) for criterion in CRITERIA} for name, own in measured.items()}
