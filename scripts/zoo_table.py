"""Merge a zoo of checkpoints with every method and measure each merge on each task.

    python scripts/zoo_table.py --zoo DIR [--tasks mnist flags ...] [--rank 16] [--samples 256] [--limit 500]

DIR has base/, tasks/NAME/ (checkpoints) and task_files/NAME.yaml. Statistics that do not lie beside a checkpoint are
estimated by the merge on --samples training images and kept in its cache. Every method runs at its default options,
or at --rank; calibration uses the same --samples images, and so does a chosen alpha (`--tune-alpha`); nothing is chosen
on the test sets. Seconds are those of the merge, with the statistics that were not in the cache yet.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from rich.console import Console
from rich.table import Table

from hf_epimer import METHODS, MergeRecipe, ModelRef, merge
from hf_epimer.evaluation.accuracy import evaluate_folder
from hf_epimer.tasks.task import Task, load_task_file

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "epimer": ("epimer", {}),
    "epimer, as in the paper": ("epimer", {"preset": "paper"}),
    "epimer, projected": ("epimer", {"metric": "projected"}),
    "epimer, kronecker": ("epimer", {"metric": "kronecker"}),
    "epimer-core, without data": ("epimer-core", {"metric": "task-vectors"}),
    **{name: (name, {}) for name in METHODS if name != "epimer"},
    **{f"{name}, calibrated": (name, {}) for name in ("mean", "tsv-m", "epimer", "epimer-core")},
    **{f"{name}, chosen alpha": (name, {}) for name in ("task-arithmetic", "ties", "dare", "tsv-m", "iso-c", "epimer")},
    "epimer-core, calibrated, refined": ("epimer-core", {}),
}
"""Row of the table -> method and options."""


class Row(NamedTuple):
    """Test accuracy of one merge on every task, and what the merge took."""

    accuracies: list[float]
    error: float
    seconds: float

    @property
    def average(self) -> float:
        """Over tasks."""
        return sum(self.accuracies) / len(self.accuracies)


def measure(zoo: Path, tasks: Sequence[Task], row: str, given: argparse.Namespace) -> Row:
    """Merge, and look at the test images; the error is the standard error of the average over tasks."""
    method, chosen = VARIANTS[row]
    rank = given.rank
    config = METHODS[method].config
    options = config(**chosen, **({"rank": rank} if rank and "rank" in config.__dataclass_fields__ else {}))
    recipe = MergeRecipe(
        models=tuple(ModelRef.parse(f"{task.name}={zoo / 'tasks' / task.name}") for task in tasks),
        base=ModelRef.parse(str(zoo / "base")),
        method=method,
        options=options,
        samples=given.samples,
        calibrate="calibrated" in row,
        refine="refined" in row,
        tune_alpha=row.endswith("chosen alpha"),
        tasks=tuple(str(zoo / "task_files" / f"{task.name}.yaml") for task in tasks),
        out=str(given.out / f"{row.replace(', ', '-').replace(' ', '-')}-{len(tasks)}"),
        overwrite=True,
    )
    report = merge(recipe)
    results = evaluate_folder(report.out, zoo / "base", tasks, name=row, limit=given.limit)
    measured = [results.tasks[task.name] for task in tasks]
    variance = sum(own.accuracy * (1 - own.accuracy) / own.samples for own in measured)
    return Row([own.accuracy for own in measured], sqrt(variance) / len(tasks), report.seconds["total"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--methods", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--rank", type=int, help="of methods that have one; default: each method's own")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--limit", type=int, help="test images per task; default: all")
    parser.add_argument("--out", type=Path, default=Path("zoo-merges"))
    options = parser.parse_args()
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    names = options.tasks or sorted(file.stem for file in (options.zoo / "task_files").glob("*.yaml"))
    tasks = [load_task_file(options.zoo / "task_files" / f"{name}.yaml") for name in names]
    rows: dict[str, Row] = {}
    for method in options.methods or VARIANTS:
        rows[method] = measure(options.zoo, tasks, method, options)
        Console(stderr=True).print(f"{method}: {rows[method].average:.3f}")
    table = Table(title=f"{len(tasks)} tasks, rank {options.rank or 'by default'}", title_justify="left")
    for column in ("method", *names, "average", "worst", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, row in rows.items():
        average = f"{row.average:.3f} ± {row.error:.3f}"
        values = (f"{value:.3f}" for value in row.accuracies)
        table.add_row(method, *values, average, f"{min(row.accuracies):.3f}", f"{row.seconds:.0f}")
    Console(width=80 + 12 * len(names)).print(table)
    file = options.out / f"accuracy-{'-'.join(names)}-rank-{options.rank or 'default'}.json"
    content = {method: row._asdict() for method, row in rows.items()}
    file.write_text(json.dumps({"tasks": names, "rank": options.rank, "rows": content}, indent=2))


if __name__ == "__main__":
    main()
