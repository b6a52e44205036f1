"""`hf-epimer methods`: the merge methods, what each needs, its options and its paper."""

from __future__ import annotations

import argparse
import json
from typing import Any

from hf_epimer.cli.arguments import add_output_arguments
from hf_epimer.cli.terminal import Command
from hf_epimer.methods import METHODS as TABLE
from hf_epimer.methods.base import Method

_MODELS = (
    "any: checkpoints of any architecture; families: those whose forward pass is known, for the statistic is measured "
    "on images (docs/families.md)"
)


def _run(namespace: argparse.Namespace) -> None:
    if namespace.json:
        print(json.dumps({name: _described(method) for name, method in TABLE.items()}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="merge methods", title_justify="left")
    for column in ("method", "what it does", "needs", "models", "options (default)", "source"):
        table.add_column(column, overflow="fold")
    for name, method in TABLE.items():
        options = ", ".join(f"{option.flag} ({option.default})" for option in method.options.values())
        table.add_row(f"[bold]{name}", method.summary, _needs(method), _models(method), options, method.paper.cited)
    console = Console()
    console.print(table)
    console.print(_MODELS, markup=False)


def _needs(method: Method) -> str:
    """The statistic, and whether it can do without."""
    return f"{method.needs or ''}{' (or nothing)' if method.needs and method.does_without else ''}"


def _models(method: Method) -> str:
    return "any" if method.takes_any_model else "families"


def _described(method: Method) -> dict[str, Any]:
    return {
        "summary": method.summary,
        "formula": method.formula,
        "needs": method.needs and method.needs.name,
        "models": _models(method),
        "options": {name: option.default for name, option in method.options.items()},
        "paper": method.paper.title,
        "url": method.paper.url,
    }


METHODS = Command("list the merge methods", add_output_arguments, _run)
