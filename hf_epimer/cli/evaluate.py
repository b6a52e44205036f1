"""`hf-epimer evaluate`: accuracy of a checkpoint on its tasks, as a table, results.json, and in its card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_epimer.cli.arguments import add_output_arguments, add_suite_argument, path
from hf_epimer.cli.terminal import Command, progress_bar
from hf_epimer.errors import OutputError, UsageError
from hf_epimer.hub.refs import ModelRef
from hf_epimer.outside import Unreadable, exists, parse_json, read_text
from hf_epimer.tasks.task import benchmark_tasks, find_task

if TYPE_CHECKING:
    from hf_epimer.evaluation.results import Results


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="REF", help="the checkpoint: a folder or org/name[@revision]")
    parser.add_argument("--task", nargs="+", action="extend", default=[], metavar="NAME|FILE", help="on which tasks")
    add_suite_argument(parser, "on a set of benchmarks")
    parser.add_argument("--base", metavar="REF", help="the base; default: from the card, or by the shape")
    parser.add_argument("--split", metavar="S", help="of the data sets; default: each task's test split")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N samples a task")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="per process; default 64")
    parser.add_argument(
        "--mixed-precision", choices=["no", "bf16"], help="of the passes; default bf16 where the processor has it"
    )
    parser.add_argument("--out", type=path, metavar="FILE", help="write results.json there")
    parser.add_argument(
        "--fine-tuned", nargs="+", type=path, default=(), metavar="FILE", help="results.json files to normalise by"
    )
    parser.add_argument("--per-class", action="store_true", help="also the accuracy within each class")
    parser.add_argument("--confusion", type=path, metavar="DIR", help="draw each task's confusion matrix there (PNG)")
    parser.add_argument("--update-card", action="store_true", help="put the accuracies into a local folder's README.md")
    add_output_arguments(parser)


def _run(namespace: argparse.Namespace) -> None:
    model = ModelRef.parse(namespace.model)
    if not namespace.task and not namespace.suite:
        raise UsageError("on which tasks? Give --task NAME|FILE, or --suite 8, 14 or 20")
    namespace.task = [*namespace.task, *(benchmark_tasks(namespace.suite) if namespace.suite else ())]
    if namespace.update_card and not model.is_local:
        raise UsageError(f"--update-card writes into a local folder, and {model} is on the Hub")
    _check_written(namespace)
    fine_tuned = _fine_tuned(namespace.fine_tuned)
    from accelerate import PartialState

    from hf_epimer.evaluation.accuracy import evaluate

    with progress_bar(namespace.quiet or namespace.json) as progress:
        results = evaluate(
            model,
            namespace.task,
            ModelRef.parse(namespace.base) if namespace.base else None,
            split=namespace.split,
            limit=namespace.limit,
            batch_size=namespace.batch_size,
            precision=namespace.mixed_precision,
            fine_tuned=fine_tuned,
            progress=progress,
        )
    state = PartialState()
    if state.is_main_process:
        _deliver(results, namespace, model.location)
    state.destroy_process_group()


def _deliver(results: Results, namespace: argparse.Namespace, folder: str) -> None:
    from hf_epimer.checkpoints.atomic import write_text
    from hf_epimer.checkpoints.manifest import entering
    from hf_epimer.pipeline.card import with_results

    content = results.to_json(namespace.per_class)
    if namespace.out:
        with entering(namespace.out):
            write_text(namespace.out, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    if namespace.update_card:
        card = Path(folder) / "README.md"
        old = card.read_text(encoding="utf-8") if card.is_file() else ""
        with entering(card):
            write_text(card, with_results(old, results, Path(folder).name))
    if namespace.confusion:
        from hf_epimer import plotting
        from hf_epimer.analysis import plots

        namespace.confusion.mkdir(parents=True, exist_ok=True)
        figures = {
            f"{task}.png": plots.confusion_matrix(task, row.class_names, row.confusion)
            for task, row in results.tasks.items()
        }
        plotting.save(figures, namespace.confusion)
    if namespace.json:
        print(json.dumps(content))
    else:
        _print(results, namespace.per_class)
        if namespace.out:
            print(f"file    {namespace.out}")


def _check_written(namespace: argparse.Namespace) -> None:
    """Refuse to write over what somebody else has written.

    Raises:
        OutputError: naming the file.
    """
    if namespace.out and namespace.out.is_dir():
        raise OutputError(f"--out {namespace.out} is a folder, not a file")
    if namespace.out and exists(namespace.out) and not _is_results(namespace.out):
        raise OutputError(f"--out {namespace.out} exists and is no results.json: choose another name")
    if namespace.confusion:
        from hf_epimer import plotting

        plotting.require()
        for task in namespace.task:
            plotting.check_replaceable(namespace.confusion / f"{find_task(task).name}.png")


def _is_results(file: Path) -> bool:
    try:
        content = parse_json(read_text(file))
    except (OSError, Unreadable):
        return False
    return isinstance(content, dict) and {"model", "tasks", "average"} <= content.keys()


def _fine_tuned(files: list[Path]) -> dict[str, float]:
    """Task -> accuracy from results.json files.

    Raises:
        UsageError: one cannot be read as such.
    """
    found: dict[str, float] = {}
    for file in files:
        try:
            rows: dict[str, Any] = parse_json(read_text(file))["tasks"]
            found |= {task: float(row["accuracy"]) for task, row in rows.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"--fine-tuned {file}: not a results.json ({error})") from error
    return found


def _print(results: Results, per_class: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    normalized = results.normalized
    table = Table(title=f"top-1 accuracy of {results.model}", title_justify="left")
    columns = ["task", "accuracy", "95% interval", "samples", *(["of fine-tuned"] if normalized else [])]
    for column in columns:
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, row in results.tasks.items():
        share = [f"{normalized[task]:.1%}" if task in normalized else ""] if normalized else []
        interval = "{:.3f} to {:.3f}".format(*row.interval)
        table.add_row(task, f"{row.accuracy:.3f}", interval, str(row.samples), *share)
    table.add_section()
    table.add_row("average", f"[bold]{results.average:.3f}")
    table.add_row(f"worst ({results.worst})", f"{results.tasks[results.worst].accuracy:.3f}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    if per_class:
        for task, row in results.tasks.items():
            found = row.per_class().items()
            shown = ", ".join(f"{name} {value:.2f}" if value is not None else f"{name} -" for name, value in found)
            console.print(f"{task}: {shown}", markup=False)


EVALUATE = Command("measure a checkpoint's accuracy on its tasks", _add_arguments, _run)
