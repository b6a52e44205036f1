"""Merge a zoo of checkpoints with every method and measure each merge on each task.

    python scripts/zoo_table.py --zoo DIR [--tasks mnist flags ...] [--rank 16] [--samples 256] [--out DIR]

DIR has base/, tasks/NAME/ (checkpoints) and task_files/NAME.yaml. Statistics that do not lie beside a checkpoint are
estimated by the merge on --samples training images and kept in its cache. Every method runs at its default options,
or at --rank; calibration uses the same --samples images; nothing is chosen on the test sets.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
}
"""Row of the table -> method and options."""


def accuracies(zoo: Path, tasks: Sequence[Task], row: str, rank: int | None, samples: int, out: Path) -> list[float]:
    """Test accuracy on every task of one merge."""
    method, chosen = VARIANTS[row]
    config = METHODS[method].config
    options = config(**chosen, **({"rank": rank} if rank and "rank" in config.__dataclass_fields__ else {}))
    recipe = MergeRecipe(
        models=tuple(ModelRef.parse(f"{task.name}={zoo / 'tasks' / task.name}") for task in tasks),
        base=ModelRef.parse(str(zoo / "base")),
        method=method,
        options=options,
        samples=samples,
        calibrate=row.endswith("calibrated"),
        tasks=tuple(str(zoo / "task_files" / f"{task.name}.yaml") for task in tasks),
        out=str(out / f"{row.replace(', ', '-')}-{len(tasks)}"),
        overwrite=True,
    )
    results = evaluate_folder(merge(recipe).out, zoo / "base", tasks, name=row)
    return [results.tasks[task.name].accuracy for task in tasks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--methods", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--rank", type=int, help="of methods that have one; default: each method's own")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("zoo-merges"))
    options = parser.parse_args()
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    names = options.tasks or sorted(file.stem for file in (options.zoo / "task_files").glob("*.yaml"))
    tasks = [load_task_file(options.zoo / "task_files" / f"{name}.yaml") for name in names]
    rows = {}
    for method in options.methods or VARIANTS:
        rows[method] = accuracies(options.zoo, tasks, method, options.rank, options.samples, options.out)
        Console(stderr=True).print(f"{method}: {sum(rows[method]) / len(tasks):.3f}")
    table = Table(title=f"{len(tasks)} tasks, rank {options.rank or 'by default'}", title_justify="left")
    for column in ("method", *names, "average", "worst"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, values in rows.items():
        table.add_row(method, *(f"{v:.3f}" for v in values), f"{sum(values) / len(values):.3f}", f"{min(values):.3f}")
    Console().print(table)
    file = options.out / f"accuracy-{len(tasks)}-rank-{options.rank or 'default'}.json"
    file.write_text(json.dumps({"tasks": names, "rank": options.rank, "accuracy": rows}, indent=2))


if __name__ == "__main__":
    main()
