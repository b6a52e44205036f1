"""`hf-epimer sweep`: rank x alpha x method, the best setting by average and by worst task, as tables and pictures."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from hf_epimer.analysis.sweep.grid import ALPHAS, RANKS, Grid
from hf_epimer.cli.arguments import (
    OF_A_SUITE,
    add_method_arguments,
    add_output_arguments,
    add_suite_argument,
    given_options,
    recipe_of,
)
from hf_epimer.cli.terminal import Command, progress_bar
from hf_epimer.errors import OutputError

if TYPE_CHECKING:
    from hf_epimer.analysis.sweep.report import SweepReport


_AXES = ("rank", "alpha")
"""Options that are axes of the grid, with flags of their own."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    absent = argparse.SUPPRESS
    ranks, alphas = " ".join(map(str, RANKS)), " ".join(f"{alpha:g}" for alpha in ALPHAS)
    parser.add_argument("models", nargs="*", metavar="[LABEL=]REF", help="checkpoints: folders or org/name[@revision]")
    add_suite_argument(parser, OF_A_SUITE)
    parser.add_argument("--base", metavar="REF", help="the common base; default: from the cards")
    parser.add_argument("--method", nargs="+", default=("epimer",), metavar="NAME", help="methods; default epimer")
    parser.add_argument("--rank", nargs="+", type=_rank, default=RANKS, metavar="K", help=f"or max; default {ranks}")
    parser.add_argument("--alpha", nargs="+", type=float, default=ALPHAS, metavar="A", help=f"default {alphas}")
    parser.add_argument("--task", nargs="+", action="extend", default=[], metavar="FILE", help="task files")
    parser.add_argument("--fisher", nargs="+", default=(), metavar="[LABEL=]REF", help="Fisher information")
    parser.add_argument(
        "--samples", type=int, default=absent, help="samples per task where curvature must be estimated; default 256"
    )
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per checkpoint")
    parser.add_argument("--limit", type=int, metavar="N", help="validation images per task; default 10%% of training")
    parser.add_argument(
        "--stop-hopeless", action="store_true", help="show all images only to settings that are not soon far behind"
    )
    parser.add_argument("--test", action="store_true", help="also measure the chosen settings on the test splits")
    parser.add_argument("--out", default="sweep", metavar="DIR", help="folder to write; default ./sweep")
    parser.add_argument("--overwrite", action="store_true", help="replace a non-empty --out")
    parser.add_argument(
        "--device", default=absent, help="where layers are solved and images classified: cpu, cuda, mps"
    )
    parser.add_argument("--dtype", default=absent, help="that merges are rounded to: float32, float16, bfloat16")
    parser.add_argument("--seed", type=int, default=absent, help="of the samples and everything random; default 0")
    parser.add_argument("--exact", action="store_true", default=absent, help="float64, full SVDs, dense solves")
    add_output_arguments(parser)
    add_method_arguments(parser.add_argument_group("method options, for the methods that have them"), _AXES)


def _rank(word: str) -> Any:
    return word if word == "max" else int(word)


def _run(namespace: argparse.Namespace) -> None:
    given = vars(namespace)
    more = {name: given[name] for name in ("samples", "device", "dtype", "seed", "exact") if name in given}
    recipe = recipe_of(namespace, "sweep", **more)
    options = given_options(namespace, _AXES)
    grid = Grid(tuple(namespace.method), tuple(namespace.rank), tuple(namespace.alpha), options)
    from hf_epimer.analysis.sweep.report import REPORT
    from hf_epimer.analysis.sweep.sweep import sweep
    from hf_epimer.plotting import MISSING

    with progress_bar(namespace.quiet or namespace.json) as progress:
        found = sweep(
            recipe,
            grid,
            namespace.out,
            progress,
            limit=namespace.limit,
            stop_hopeless=namespace.stop_hopeless,
            test=namespace.test,
        )
    if namespace.json:
        print(json.dumps({"out": str(found.out), "pictures": found.pictures, **found.to_json()}))
    else:
        _print_report(found)
    if not found.pictures:
        raise OutputError(f"{MISSING}; {found.out / REPORT} is complete without them")


def _print_report(found: SweepReport) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    images = sum(found.samples.values())
    title = f"{len(found.rows)} settings on {images} validation images of {len(found.splits)} tasks"
    if found.stopped:
        title += f", {len(found.stopped)} of them stopped early: {found.spared:.0%} of the work spared"
    table = Table(title=title, title_justify="left", box=None)
    console = Console(highlight=False, soft_wrap=True)
    # what does not fit beside the rest is left to sweep.md
    names = list(found.splits) if console.width >= 72 + sum(len(name) + 2 for name in found.splits) else []
    columns = ["method", "chosen by", "rank", "alpha", *names, "average", "worst"]
    for column in [*columns, *(["test avg.", "worst"] if found.test else [])]:
        table.add_column(column, justify="left" if column in ("method", "chosen by") else "right", no_wrap=True)
    for method in found.best:
        for row, chosen_by in found.choices(method).items():
            setting = row.setting
            edge = "*" if found.at_edge(row) else ""
            cells = [method, chosen_by, "" if setting.rank is None else str(setting.rank)]
            cells += ["" if setting.alpha is None else f"{setting.alpha:g}{edge}"]
            values = [*(row.tasks[name].accuracy for name in names), row.average, row.worst]
            tested = found.tested(setting)
            values += [tested.average, tested.worst] if tested else []
            table.add_row(*map(escape, cells), *(f"{value:.3f}" for value in values))
    console.print(table)
    console.print(f"one standard error of the average: about {found.winner('average').error:.3f}")
    if any(found.at_edge(row) for own in found.best.values() for row in own.values()):
        console.print("* at the end of the grid: an alpha beyond it may be better")
    for criterion, words in (("average", "on average"), ("worst", "by worst task")):
        row = found.winner(criterion)
        console.print(f"[bold green]best {words}[/] {escape(str(row.setting))}: {getattr(row, criterion):.3f}")
        console.print(f"  {escape(found.commands[row.setting])}")
    console.print(f"folder  {escape(str(found.out))}")


SWEEP = Command("try ranks, alphas and methods, and choose on validation images", _add_arguments, _run)
