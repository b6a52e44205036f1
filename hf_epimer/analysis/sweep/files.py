"""The files of a sweep: sweep.csv, sweep.md, sweep.json and two pictures."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_epimer.analysis.sweep.grid import Setting
from hf_epimer.analysis.sweep.report import CRITERIA, REPORT, Row, SweepReport
from hf_epimer.analysis.sweep.stopping import ERRORS
from hf_epimer.checkpoints.writer import write_json

TABLE, MARKDOWN = "sweep.csv", "sweep.md"


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
    stopped = {(row.setting.method, row.setting.rank, row.setting.alpha) for row in report.stopped}
    figures = {"heatmap.png": plots.accuracy_heatmap(values, report.ranks, report.alphas, stopped)}
    lines = {name: _lines(report, name) for name in report.methods}
    figures["lines.png"] = plots.accuracy_by_alpha(lines)
    return tuple(plotting.save(figures, folder))


def _csv(report: SweepReport) -> list[list[Any]]:
    """One line per setting and task, then its average and its worst task."""
    lines: list[list[Any]] = [["split", "method", "rank", "alpha", "measure", "task", "accuracy", "correct", "samples"]]
    lines[0] += ["stopped"] if report.stop_hopeless else []
    for split, rows in (("validation", report.rows), ("test", report.test)):
        for row in rows:
            start = [split, *("" if value is None else value for value in vars(row.setting).values())]
            end = [int(row.stopped)] if report.stop_hopeless else []
            for name, result in row.tasks.items():
                lines.append([*start, "task", name, result.accuracy, result.correct, result.samples, *end])
            lines.append([*start, "average", "", row.average, "", "", *end])
            lines.append([*start, "worst", row.worst_task, row.worst, "", "", *end])
    return lines


def _markdown(report: SweepReport) -> str:
    names = list(report.splits)
    images = ", ".join(f"{samples} of {name}" for name, samples in report.samples.items())
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
    text += ["", "## All settings", "", *_table(report.rows, names, bold=True, images=report.stop_hopeless)]
    if report.stopped:
        text += [
            "",
            f"Stopped on a part of the images: {len(report.stopped)} of {len(report.rows)} settings, behind the best "
            f"of their method by more than {ERRORS:g} standard errors, on average and by worst task. "
            f"{report.spared:.0%} of the work was spared.",
        ]
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


def _table(rows: Sequence[Row], names: Sequence[str], bold: bool = False, images: bool = False) -> list[str]:
    """One line per setting; the largest number of every column in bold, where it was measured on all images.

    Args:
        images: say on how many images each was measured.
    """
    columns = [*([row.tasks[name].accuracy for row in rows] for name in names)]
    columns += [[row.average for row in rows], [row.worst for row in rows]]
    largest = [max(value for row, value in zip(rows, column) if not row.stopped) for column in columns]
    lines = [f"| method | rank | alpha | {' | '.join(names)} | average | worst |"]
    lines.append("|---|---:|---:|" + "---:|" * len(columns))
    if images:
        lines = [f"{lines[0]} images |", f"{lines[1]}---:|"]
    for number, row in enumerate(rows):
        values = [
            f"**{column[number]:.3f}**"
            if bold and not row.stopped and column[number] == top
            else f"{column[number]:.3f}"
            for column, top in zip(columns, largest)
        ]
        values += [f"{row.images}, stopped" if row.stopped else f"{row.images}"] if images else []
        lines.append(f"| {' | '.join([row.setting.method, *_cells(row.setting), *values])} |")
    return lines


def _cells(setting: Setting) -> list[str]:
    rank, alpha = setting.rank, setting.alpha
    return ["" if rank is None else str(rank), "" if alpha is None else f"{alpha:g}"]


def _grid(report: SweepReport, name: str) -> dict[tuple[int | None, float | None], float]:
    return {(row.setting.rank, row.setting.alpha): row.average for row in report.rows if row.setting.method == name}


def _lines(report: SweepReport, name: str) -> tuple[int | None, dict[float | None, tuple[float, float]]]:
    """A method at its best rank by average: alpha -> (average, worst), of what was measured on all images."""
    rank = report.best[name]["average"].setting.rank
    return rank, {
        row.setting.alpha: (row.average, row.worst)
        for row in report.rows
        if row.setting.method == name and row.setting.rank == rank and not row.stopped
    }
