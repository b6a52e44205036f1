"""`hf-epimer merge`: from words to a recipe, and from its report to a few lines."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hf_epimer.cli.arguments import (
    OF_A_SUITE,
    add_method_arguments,
    add_output_arguments,
    add_suite_argument,
    check_options,
    given_options,
    models_of,
    path,
)
from hf_epimer.cli.terminal import Command, progress_bar, without_layers
from hf_epimer.errors import UsageError
from hf_epimer.hub.refs import ModelRef
from hf_epimer.methods import DEFAULT_METHOD, find_method
from hf_epimer.pipeline.recipe import MergeRecipe, recipe_from_json

if TYPE_CHECKING:
    from hf_epimer.pipeline.plan import Plan
    from hf_epimer.pipeline.report import MergeReport


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    absent = argparse.SUPPRESS
    what = "checkpoints or LoRA adapters: folders or org/name[@revision]"
    parser.add_argument("models", nargs="*", metavar="[LABEL=]REF", help=what)
    add_suite_argument(parser, OF_A_SUITE)
    parser.add_argument("--base", default=absent, metavar="REF", help="the common base; default: from the cards")
    parser.add_argument("--method", default=absent, help="see `hf-epimer methods`; default epimer-core")
    parser.add_argument("--weights", nargs="+", type=float, default=absent, metavar="W", help="one per checkpoint")
    parser.add_argument("--fisher", nargs="+", default=absent, metavar="[LABEL=]REF", help="Fisher information")
    parser.add_argument(
        "--samples", type=int, default=absent, help="samples per task where curvature must be estimated; default 256"
    )
    what = "gigabytes beyond which a data set's samples are streamed, not all of it downloaded; default 2"
    parser.add_argument("--max-data", type=float, default=absent, metavar="GB", help=what)
    what = "solve layers again in forward order, on --samples images of every task; epimer-core does unless told not to"
    parser.add_argument("--calibrate", action=argparse.BooleanOptionalAction, default=absent, help=what)
    what = "of a calibration: how often every image is seen, whole and as random crops; default 1"
    parser.add_argument("--views", type=int, default=absent, metavar="N", help=what)
    what = "of a calibration: how strongly a layer is held where it is; default 0.2"
    parser.add_argument("--calibration-rho", type=float, default=absent, metavar="RHO", help=what)
    what = "of the passes for statistics and calibration, not of their sums; default no"
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default=absent, help=what)
    what = "train the merge towards its models' features, on --samples images of every task without labels"
    parser.add_argument("--refine", action="store_true", default=absent, help=what)
    what = "of a refinement: steps of 16 images of every task; default 100"
    parser.add_argument("--refine-steps", type=int, default=absent, metavar="N", help=what)
    what = "choose alpha by how near predictions come to the checkpoints' own on --samples images of every task"
    parser.add_argument("--tune-alpha", action="store_true", default=absent, help=what)
    parser.add_argument("--evaluate", action="store_true", default=absent, help="measure the merge on its tasks")
    parser.add_argument("--limit", type=int, default=absent, metavar="N", help="with --evaluate: test images per task")
    what = "with --evaluate: measure the base and the fine-tuned checkpoints, too"
    parser.add_argument("--compare", action="store_true", default=absent, help=what)
    what = "with --evaluate: benchmarks for whose leaderboards .eval_results/ is written"
    parser.add_argument("--eval-results", nargs="+", default=absent, metavar="DATASET[:TASK_ID]", help=what)
    parser.add_argument("--task", nargs="+", action="extend", default=absent, metavar="FILE", help="task files")
    parser.add_argument("--out", default=absent, metavar="DIR", help="folder to write; default ./merged-METHOD")
    parser.add_argument("--overwrite", action="store_true", default=absent, help="replace a non-empty --out")
    parser.add_argument("--push-to", default=absent, metavar="ORG/NAME", help="push the merge to the Hub")
    parser.add_argument("--private", action="store_true", default=absent, help="create the pushed repo private")
    parser.add_argument("--create-pr", action="store_true", default=absent, help="open a pull request instead")
    parser.add_argument("--config", type=path, metavar="FILE", help="repeat a merge_config.json")
    parser.add_argument("--device", default=absent, help="where layers are solved: cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", default=absent, help="of the written weights: float32, float16, bfloat16")
    parser.add_argument("--seed", type=int, default=absent, help="of everything random; default 0")
    parser.add_argument("--exact", action="store_true", default=absent, help="float64, full SVDs, dense solves")
    parser.add_argument("--out-rank", type=int, default=absent, metavar="R", help="of adapters: the result's rank")
    what = "write the vision tower in the base's whole model, with text tower and tokenizer"
    parser.add_argument("--full", action="store_true", default=absent, help=what)
    parser.add_argument("--dense", action="store_true", default=absent, help="of adapters: write a full checkpoint")
    what = "of models of no known family: parameters that stay as they are in the base (`*` for any letters)"
    parser.add_argument("--skip", nargs="+", action="extend", default=absent, metavar="PATTERN", help=what)
    parser.add_argument("--dry-run", action="store_true", help="resolve, check, print the plan; write nothing")
    add_output_arguments(parser)
    add_method_arguments(parser.add_argument_group("method options"))


def _recipe(namespace: argparse.Namespace) -> MergeRecipe:
    """The recipe that the words ask for; a --config file fills in what they leave out."""
    given = vars(namespace)
    arguments: dict[str, Any] = recipe_from_json(namespace.config) if namespace.config else {}
    if namespace.config and namespace.models:
        raise UsageError("--config names its checkpoints itself: give no others")
    if namespace.models or not namespace.config:
        arguments["models"] = models_of(namespace, "merge")
    if "tune_alpha" in given and "alpha" in given:
        raise UsageError("--alpha and --tune-alpha: give one of them")
    method = find_method(given.get("method", arguments.get("method", DEFAULT_METHOD)))
    if arguments.get("method", method.name) != method.name:
        arguments.pop("options")
        arguments.pop("calibrate", None)  # what the other method did by itself
    options = given_options(namespace)
    check_options(method, options)
    of_file = arguments.get("options")
    arguments |= {"method": method.name, "options": method.config(**(vars(of_file) if of_file else {}) | options)}
    lists = {"weights": "weights", "eval_results": "eval_results", "task": "tasks", "skip": "skip"}  # flag -> field
    plain = {item.name for item in fields(MergeRecipe)} - {"models", "base", "method", "fisher", *lists.values()}
    arguments |= {name: given[name] for name in plain if name in given}
    if "base" in given:
        arguments["base"] = ModelRef.parse(given["base"])
    arguments |= {name: tuple(given[flag]) for flag, name in lists.items() if flag in given}
    if "fisher" in given:
        arguments["fisher"] = tuple(map(ModelRef.parse, given["fisher"]))
    return MergeRecipe(**arguments, command=tuple(namespace.words))


def _run(namespace: argparse.Namespace) -> None:
    recipe = _recipe(namespace)
    from hf_epimer.pipeline.merge import merge
    from hf_epimer.pipeline.planner import make_plan
    from hf_epimer.pipeline.processes import launched, leave

    is_main = launched().is_main
    if not is_main:
        logging.disable(logging.WARNING)  # one process speaks for all
    if namespace.dry_run:
        plan = make_plan(recipe, any_architecture=True)
        if is_main:
            _print_plan(plan, namespace.json)
        return
    with progress_bar(namespace.quiet or namespace.json or not is_main) as progress:
        report = merge(recipe, progress)
    leave()
    if is_main:
        _print_report(recipe, report, namespace.json)


def _print_report(recipe: MergeRecipe, report: MergeReport, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"out": str(report.out), "url": report.url, **without_layers(report.to_json())}))
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    totals = report.totals
    what = "adapters" if "largest_rank" in totals else "checkpoints"
    console.print(
        f"[bold green]merged[/] {len(recipe.models)} {what} with [bold]{report.method}[/] "
        f"in {report.seconds['total']:.1f} s"
    )
    for name, value in report.in_words().items():
        console.print(f"  {name}: {value}", markup=False)
    if report.results:
        for task, row in report.results["tasks"].items():
            console.print(f"  {escape(task):<16} {row['accuracy']:.3f}")
        console.print(f"  {'average':<16} {report.results['average']:.3f}")
    console.print(f"folder  {escape(str(report.out))}")
    if report.url:
        console.print(f"pushed  {report.url}")


def _print_plan(plan: Plan, as_json: bool) -> None:
    summary = plan.summary()
    if plan.recipe.calibrate or plan.recipe.refine:
        from hf_epimer.pipeline.cost import expected, in_words

        shown = round if as_json else in_words
        summary["expected_seconds"] = {part: shown(seconds) for part, seconds in expected(plan).items()}
    if as_json:
        print(json.dumps(summary))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in summary.items():
        if name.endswith(("_bytes", "bytes_to_read")):
            value = f"{value / 1e9:.2f} GB"
        elif isinstance(value, dict):
            value = "\n".join(f"{key}: {entry}" for key, entry in value.items())
        elif isinstance(value, list):
            value = "\n".join(map(str, value))
        table.add_row(f"[bold]{name.replace('_', ' ')}", escape(str(value)) if value not in (None, "") else "none")
    Console(highlight=False, soft_wrap=True).print(table)


MERGE = Command("merge fine-tuned checkpoints into one", _add_arguments, _run)
