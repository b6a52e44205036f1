"""What a sweep found, which settings are best, and its files: sweep.csv, sweep.md, sweep.json and two pictures.

best by average: the largest mean over tasks of the accuracy; best by worst task: the largest minimum over tasks. Ties
go to the other criterion, then to the smaller rank and alpha. Both look at validation rows only.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_epimer.analysis.sweep.grid import Setting
from hf_epimer.checkpoints.writer import write_json
from hf_epimer.evaluation.results import TaskResult

FORMAT = "hf-epimer.sweep/1"
TABLE, MARKDOWN, REPORT = "sweep.csv", "sweep.md", "sweep.json"
CRITERIA = ("average", "worst")


@dataclass(frozen=True, eq=False)
class Row:
    """One setting, measured: task -> accuracy."""

    setting: Setting
    tasks: Mapping[str, TaskResult]

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
    pictures: tuple[str, ...] = ()

    def winner(self, criterion: str) -> Row:
        """The best setting of all methods by `average` or by `worst` task."""
        return best_row([chosen[criterion] for chosen in self.best.values()], criterion)

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
                    name: {"split": split, "rows_before": before, "samples": self.rows[0].tasks[name].samples}
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
            "results": [row.to_json() for row in self.rows],
            "seconds": self.seconds,
        }


def best_row(rows: Sequence[Row], criterion: str) -> Row:
    """The best of some rows; of equal ones the first."""
    other = next(name for name in CRITERIA if name != criterion)
    # rounded: (0.7 + 0.6) / 2 is a little less than (0.9 + 0.4) / 2
    return max(rows, key=lambda row: (round(getattr(row, criterion), 9), round(getattr(row, other), 9)))


def best_rows(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Method -> criterion -> its best row."""
    methods = dict.fromkeys(row.setting.method for row in rows)
    return {
        name: {
            criterion: best_row([row for row in rows if row.setting.method == name], criterion)
            for criterion in CRITERIA
        }
        for name in methods
    }


# --- files ----------------------------------------------------------------------------------------------------------


def write_report(report: SweepReport, folder: Path) -> tuple[str, ...]:
    """Write everything into `folder`; the names of the pictures, none where matplotlib is missing."""
    with open(folder / TABLE, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(_csv(report))
    (folder / MARKDOWN).write_text(_markdown(report), encoding="utf-8")
    write_json(folder / REPORT, report.to_json())
    from hf_epimer import plotting
    from hf_epimer.analysis import plots

    if not plotting.available():
        return ()
    values = {name: _grid(report, name) for name in report.methods}
    figures = {"heatmap.png": plots.accuracy_heatmap(values, report.ranks, report.alphas)}
    lines = {name: _lines(report, name) for name in report.methods}
    figures["lines.png"] = plots.accuracy_by_alpha(lines)
    return tuple(plotting.save(figures, folder))


def _csv(report: SweepReport) -> list[list[Any]]:
    """One line per setting and task, then its average and its worst task."""
    lines: list[list[Any]] = [["split", "method", "rank", "alpha", "measure", "task", "accuracy", "correct", "samples"]]
    for split, rows in (("validation", report.rows), ("test", report.test)):
        for row in rows:
            start = [split, *("" if value is None else value for value in vars(row.setting).values())]
            for name, result in row.tasks.items():
                lines.append([*start, "task", name, result.accuracy, result.correct, result.samples])
            lines.append([*start, "average", "", row.average, "", ""])
            lines.append([*start, "worst", row.worst_task, row.worst, "", ""])
    return lines


def _markdown(report: SweepReport) -> str:
    names = list(report.splits)
    images = ", ".join(f"{report.rows[0].tasks[name].samples} of {name}" for name in names)
    text = [
        "# Sweep",
        "",
        f"Accuracy on validation images ({images}): the end of the training splits, shuffled with seed {report.seed}. "
        "Settings are chosen on these, never on test.",
    ]
    for criterion in CRITERIA:
        row = report.winner(criterion)
        text += [
            "",
            f"**Best by {_NAMES[criterion]}**: {row.setting} (average {row.average:.3f}, worst {row.worst:.3f}",
        ]
        text[-1] += f" on {row.worst_task}; one standard error of the average {row.error:.3f})"
        text += ["", "```bash", report.commands[row.setting], "```"]
    text += ["", "## Best setting of every method", "", *_best_table(report)]
    text += ["", "## All settings", "", *_table(report.rows, names, bold=True)]
    if report.test:
        text += ["", "## The chosen settings on the test splits", "", *_table(report.test, names)]
    return "\n".join(text) + "\n"


_NAMES = {"average": "average", "worst": "worst task"}


def _best_table(report: SweepReport) -> list[str]:
    lines = [
        "| method | chosen by | rank | alpha | average | worst |"
        + (" test average | test worst |" if report.test else "")
    ]
    lines.append("|---|---|---:|---:|---:|---:|" + ("---:|---:|" if report.test else ""))
    for name in report.best:
        for row, chosen_by in report.choices(name).items():
            cells = [name, chosen_by, *_cells(row.setting), f"{row.average:.3f}", f"{row.worst:.3f}"]
            tested = report.tested(row.setting)
            cells += [f"{tested.average:.3f}", f"{tested.worst:.3f}"] if tested else []
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _table(rows: Sequence[Row], names: Sequence[str], bold: bool = False) -> list[str]:
    """One line per setting; the largest number of every column in bold."""
    columns = [*([row.tasks[name].accuracy for row in rows] for name in names)]
    columns += [[row.average for row in rows], [row.worst for row in rows]]
    lines = [f"| method | rank | alpha | {' | '.join(names)} | average | worst |"]
    lines.append("|---|---:|---:|" + "---:|" * len(columns))
    for number, row in enumerate(rows):
        values = [
            f"**{column[number]:.3f}**" if bold and column[number] == max(column) else f"{column[number]:.3f}"
            for column in columns
        ]
        lines.append(f"| {' | '.join([row.setting.method, *_cells(row.setting), *values])} |")
    return lines


def _cells(setting: Setting) -> list[str]:
    rank, alpha = setting.rank, setting.alpha
    return ["" if rank is None else str(rank), "" if alpha is None else f"{alpha:g}"]


def _grid(report: SweepReport, name: str) -> dict[tuple[int | None, float | None], float]:
    return {(row.setting.rank, row.setting.alpha): row.average for row in report.rows if row.setting.method == name}


def _lines(report: SweepReport, name: str) -> tuple[int | None, dict[float | None, tuple[float, float]]]:
    """A method at its best rank by average: alpha -> (average, worst)."""
    rank = report.best[name]["average"].setting.rank
    return rank, {
        row.setting.alpha: (row.average, row.worst)
        for row in report.rows
        if row.setting.method == name and row.setting.rank == rank
    }
