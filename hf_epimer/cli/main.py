"""The command line: words in, results on stdout, progress and complaints on stderr.

The commands are this room's other files; each imports what is heavy (torch, the Hub's client) when it is run, so that
help and wrong words cost nothing. Every error is one line starting `error:`; HF_EPIMER_DEBUG=1 shows the traceback too.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from hf_epimer import __version__
from hf_epimer.checkpoints.cache import remove_spare
from hf_epimer.cli.convert import CONVERT
from hf_epimer.cli.demo import DEMO
from hf_epimer.cli.diagnose import DIAGNOSE
from hf_epimer.cli.evaluate import EVALUATE
from hf_epimer.cli.fisher import FISHER
from hf_epimer.cli.merge import MERGE
from hf_epimer.cli.methods import METHODS
from hf_epimer.cli.push import PUSH
from hf_epimer.cli.sweep import SWEEP
from hf_epimer.cli.tasks import TASKS
from hf_epimer.cli.terminal import label_waits, silence_libraries
from hf_epimer.errors import EpimerError, UsageError
from hf_epimer.hub.words import without_queries


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # torch's threads spin while they wait; beside another busy program that makes small decompositions 30x slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    silence_libraries()
    complaints = _Complaints()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[complaints], force=True)
    label_waits(complaints)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a path or an accent must not fail a merge that is done
    try:
        with _interruptible(), _labelled_warnings():
            _dispatch(words)
    except EpimerError as error:
        return _fail(error, error.exit_code)
    except KeyboardInterrupt as error:
        return _fail(error, 1, "interrupted; nothing half-written was left behind")
    except BrokenPipeError:
        return 1
    except Exception as error:
        hint = "" if isinstance(error, ArithmeticError) else " (HF_EPIMER_DEBUG=1 shows where)"
        return _fail(error, 1, f"{_one_line(error) or type(error).__name__}{hint}")
    return 0


def console() -> NoReturn:
    """The `hf-epimer` program: after a failure it does not wait for downloads still under way in threads."""
    code = main()
    remove_spare()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack like Ctrl-C does; outside the main thread signals are not ours."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _dispatch(words: list[str]) -> None:
    chosen = next((word for word in words if not word.startswith("-")), None)
    if chosen is not None and chosen not in COMMANDS:
        raise UsageError(f"there is no command {chosen!r}; there are {', '.join(COMMANDS)}")
    parser = _Parser(prog="hf-epimer", description="Merge fine-tuned CLIP vision models without training.")
    parser.add_argument("--version", action="version", version=f"hf-epimer {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.summary)
    if chosen is None:
        parser.parse_args(words)
        return
    command = COMMANDS[chosen]
    own = _Parser(prog=f"hf-epimer {chosen}", description=command.summary, allow_abbrev=False)
    command.add_arguments(own)
    # intermixed: references may stand before, between and after the flags
    namespace = own.parse_intermixed_args(words[: words.index(chosen)] + words[words.index(chosen) + 1 :])
    namespace.words = words
    command.run(namespace)


def _fail(error: BaseException, code: int, message: str | None = None) -> int:
    if os.environ.get("HF_EPIMER_DEBUG") == "1":
        raise error
    print(f"error: {message or _one_line(error)}", file=sys.stderr)
    return code


def _one_line(text: object) -> str:
    """On one line, without the middle where that is long: a stranger's names may be of any length."""
    line = without_queries(" ".join(str(text).split()))
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"


_LONGEST_LINE = 2000
"""Characters of what went wrong."""


class _Complaints(logging.Handler):
    """Warnings as `warning: ...` lines on stderr: our own, and what huggingface_hub says while it waits.

    What would be said of a model again, each time that it is looked at, is said the first time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{record.levelname.lower()}: {_one_line(record.getMessage())}"
        is_news = record.name.startswith("hf_epimer") and line not in self.said
        if is_news or record.name.startswith("huggingface_hub"):
            print(line, file=sys.stderr)
            self.said.add(line)


@contextmanager
def _labelled_warnings() -> Iterator[None]:
    """What libraries warn of in Python's way: a line like our own, without their lines of code."""

    def show(message: Warning | str, *place: object) -> None:
        print(f"warning: {_one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


COMMANDS = {
    "merge": MERGE,
    "fisher": FISHER,
    "evaluate": EVALUATE,
    "diagnose": DIAGNOSE,
    "sweep": SWEEP,
    "push": PUSH,
    "convert": CONVERT,
    "methods": METHODS,
    "tasks": TASKS,
    "demo": DEMO,
}
