"""What the commands share at the terminal: the shape of a command, the progress bar, silence from the libraries."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hf_epimer.types import Progress


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers takes this one for its own, too
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "critical",
}
"""What the libraries are told in the environment, which each of them reads when it is imported."""


def silence_libraries() -> None:
    """No progress bars but ours; what goes wrong is said in our own words.

    Libraries that are imported already go on as they are. What is set in the environment stays as it is.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def label_waits(handler: logging.Handler) -> None:
    """What huggingface_hub says of requests that it makes again, and may wait minutes for, through our handler."""
    for name in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.handlers = [handler]


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
