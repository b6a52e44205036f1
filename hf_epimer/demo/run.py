"""`hf-epimer demo`: make the zoo (once), merge it in five ways, measure every merge, print one table.

Everything goes through the public functions, the way a user's own script would.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_epimer.demo import zoo_folder
from hf_epimer.demo.zoo import make_zoo
from hf_epimer.evaluation.accuracy import evaluate_folder
from hf_epimer.hub.refs import ModelRef
from hf_epimer.pipeline.merge import merge
from hf_epimer.pipeline.recipe import MergeRecipe
from hf_epimer.tasks.task import load_task_file

MERGES = ("mean", "ties", "tsv-m", "epimer", "epimer, calibrated")
"""Methods, with and without calibration."""

Results = dict[str, dict[str, float]]


def run_demo(out: Path, *, quiet: bool = False, as_json: bool = False) -> None:
    """Make, merge, measure, and print."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    log = Console(stderr=True, quiet=quiet or as_json)
    columns = (SpinnerColumn(), TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=log, transient=True, disable=not log.is_terminal) as bars:
        zoo = _zoo(bars, log)
        results = _merge_and_measure(zoo, out, bars)
    if as_json:
        print(json.dumps({"zoo": str(zoo), "out": str(out), "accuracy": results}))
        return
    _show(zoo, out, results)


def _zoo(bars: Any, log: Any) -> Path:
    folder = zoo_folder()
    if not (folder / "zoo.json").is_file():
        log.print("making the demo zoo, once: a tiny CLIP and four fine-tuned towers (two to three minutes)")
    stages: dict[str, Any] = {}

    def show(stage: str, fraction: float) -> None:
        if stage not in stages:
            what = "training the base" if stage == "base" else f"fine-tuning on {stage}"
            stages[stage] = bars.add_task(what, total=1.0)
            log.print(f"  {what}")
        bars.update(stages[stage], completed=fraction)

    return make_zoo(folder, show)


def _merge_and_measure(zoo: Path, out: Path, bars: Any) -> Results:
    """Method -> task -> accuracy, with the base's zero-shot and the fine-tuned models' own accuracies first."""
    summary = json.loads((zoo / "zoo.json").read_text(encoding="utf-8"))
    names = list(summary["tasks"])
    files = [zoo / "tasks" / f"{name}.yaml" for name in names]
    tasks = [load_task_file(file) for file in files]
    results: Results = {
        "zero-shot": {name: summary["tasks"][name]["zero_shot"] for name in names},
        "fine-tuned": {name: summary["tasks"][name]["fine_tuned"] for name in names},
    }
    for name in MERGES:
        bar = bars.add_task(f"merging with {name}", total=len(tasks) + 1)
        method, _, calibrated = name.partition(", ")
        recipe = MergeRecipe(
            models=tuple(ModelRef.parse(f"{task}={zoo / task}") for task in names),
            base=ModelRef.parse(str(zoo / "base")),
            method=method,
            calibrate=bool(calibrated),
            tasks=tuple(map(str, files)),
            out=str(out / _folder(name)),
            overwrite=True,
        )
        report = merge(recipe)
        bars.advance(bar)
        step: Callable[[], None] = lambda bar=bar: bars.advance(bar)  # type: ignore[misc]  # noqa: E731
        measured = evaluate_folder(report.out, zoo / "base", tasks, name=name, on_task=step)
        results[name] = {task: measured.tasks[task].accuracy for task in names}
    return results


def _folder(name: str) -> str:
    return name.replace(", ", "-")


def _show(zoo: Path, out: Path, results: Results) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(results["fine-tuned"])
    columns = {name: {row: scores[name] for row, scores in results.items()} for name in names}
    columns["average"] = {row: sum(scores.values()) / len(scores) for row, scores in results.items()}
    columns["worst"] = {row: min(scores.values()) for row, scores in results.items()}
    best = {name: max(values[method] for method in MERGES) for name, values in columns.items()}
    table = Table(title="top-1 accuracy on the test sets: one model for all four tasks", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", style="bold" if name in ("average", "worst") else "")
    for row in results:
        is_merge = row in MERGES
        cells = []
        for name, values in columns.items():
            text = f"{values[row]:.3f}"
            cells.append(f"[green]{text}[/]" if is_merge and values[row] == best[name] else text)
        known = {"zero-shot": "base, zero-shot", "fine-tuned": "four models", MERGES[-1]: "    and calibrated"}
        label = known.get(row, f"merged: {row}")
        table.add_row(label, *cells, style="" if is_merge else "dim", end_section=row == "fine-tuned")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    models = " ".join(f"{name}={zoo / name}" for name in names[:2])
    program = "hf-epimer"
    if shutil.which(program) is None:  # run through make: the environment's own copy, as seen from here
        program = os.path.relpath(Path(sys.executable).with_name(program))
    console.print(
        f"\n[bold]merged models[/]  {out}/{{{','.join(map(_folder, MERGES))}}}, each with its model card (README.md)\n"
        f"[bold]the zoo[/]        {zoo}\n\n"
        "[bold]try next[/]\n"
        f"  {program} merge {models} --base {zoo / 'base'} --rank 16\n"
        f"  {program} methods\n"
        f"  {program} merge org/vit-b32-dtd org/vit-b32-svhn --push-to org/merged   # your own, from the Hub"
    )
