"""`hf-epimer diagnose`: a look at checkpoints before merging them, as a table, a verdict, JSON and pictures."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from hf_epimer.analysis import RANKS
from hf_epimer.cli.arguments import OF_A_SUITE, add_output_arguments, add_suite_argument, recipe_of
from hf_epimer.cli.terminal import Command, progress_bar, without_layers
from hf_epimer.errors import OutputError

if TYPE_CHECKING:
    from hf_epimer.analysis.diagnosis_report import Diagnosis


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    ranks = " ".join(map(str, RANKS))
    parser.add_argument("models", nargs="*", metavar="[LABEL=]REF", help="checkpoints: folders or org/name[@revision]")
    add_suite_argument(parser, OF_A_SUITE)
    parser.add_argument("--base", metavar="REF", help="the common base; default: from the cards")
    parser.add_argument("--rank", nargs="+", type=int, default=RANKS, metavar="K", help=f"ranks; default {ranks}")
    parser.add_argument("--fisher", nargs="+", default=(), metavar="[LABEL=]REF", help="Fisher information")
    parser.add_argument("--samples", type=int, metavar="N", help="estimate what is missing of it, on N samples a task")
    parser.add_argument("--task", nargs="+", action="extend", default=[], metavar="FILE", help="task files")
    parser.add_argument("--exact", action="store_true", help="judge every metric by the exact Hessian (small models)")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per checkpoint")
    parser.add_argument("--out", default="diagnosis", metavar="DIR", help="folder to write; default ./diagnosis")
    parser.add_argument("--overwrite", action="store_true", help="replace a non-empty --out")
    add_output_arguments(parser)


def _run(namespace: argparse.Namespace) -> None:
    recipe = recipe_of(namespace, "diagnose", **({} if namespace.samples is None else {"samples": namespace.samples}))
    from hf_epimer.analysis.diagnosis import diagnose
    from hf_epimer.analysis.diagnosis_report import REPORT
    from hf_epimer.plotting import MISSING

    with progress_bar(namespace.quiet or namespace.json) as progress:
        found = diagnose(
            recipe,
            namespace.rank,
            namespace.out,
            progress,
            estimate=namespace.samples is not None,
            exact=namespace.exact,
        )
    if namespace.json:
        print(json.dumps({"out": str(found.out), "pictures": found.pictures, **without_layers(found.to_json())}))
    else:
        _print_diagnosis(found)
    if not found.pictures:
        raise OutputError(f"{MISSING}; {found.out / REPORT} is complete without them")


def _print_diagnosis(found: Diagnosis) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{len(found.labels)} tasks, all layers", title_justify="left", box=None)
    columns = ["rank", "least kept", "own alone"]
    if found.statistics:
        columns += ["eta share", "equal traces", "V_S", "R_S", "bound", "isotropy dev."]
    for column in columns:
        table.add_column(column, justify="right")
    for total in found.totals:
        row = [str(total.rank), f"{total.least_kept:.0%}", f"{total.least_singular:.0%}"]
        if own := total.curvature:
            row += [f"{own.share:.1%}", f"{own.share_trace:.1%}"]
            row += [f"{value:.1e}" for value in (own.variance, own.residual, own.bound)]
            row.append(f"{total.isotropy[0]:.2f}")
        table.add_row(*row)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for total in found.totals:
        if total.capped:
            console.print(f"rank {total.rank} capped at floor(min(m, n) / T) in {total.capped} layers")
    for label, metrics in found.exact.items():
        agreements = ", ".join(f"{name} {own.agreement:.2f} (x {own.scale:.2g})" for name, own in metrics.items())
        console.print(f"agreement with the exact Hessian, {escape(label)}: {agreements}")
    for sentence in (*found.verdict, *([found.note] if found.note else [])):
        console.print(f"- {escape(sentence)}")
    console.print(f"folder  {escape(str(found.out))}")


DIAGNOSE = Command("look at checkpoints before merging them", _add_arguments, _run)
