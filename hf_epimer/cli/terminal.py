"""What the commands share at the terminal: output flags, the progress bar, the shape of a command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_epimer.types import Progress


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that prints something."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def silence_libraries() -> None:
    """No progress bars but ours; what goes wrong is said in our own words."""
    import datasets
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.getLogger("datasets").setLevel(logging.ERROR)


def without_layers(report: dict[str, Any]) -> dict[str, Any]:
    """A report's totals, for the terminal; every layer is in its file."""
    return {name: value for name, value in report.items() if name != "layers"}


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress]:
    """A live bar on stderr for stages that last; none when stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        stages: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total or None)
            bars.advance(stages[stage], done)

        yield show
