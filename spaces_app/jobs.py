"""Long work in a process of its own, so that Cancel and the time limit really end it and a crash takes nothing along.

    page  --function, arguments-->  child          child  --Progress ..., then Done or Failed-->  page

Children are forked from a server that has imported everything already (`warm_up`) and has never computed anything, so a
job starts at once. Ending one is SIGTERM, upon which the child unwinds as after Ctrl-C and removes what it had begun;
one that does not listen is killed.

On a ZeroGPU Space what needs a GPU (`ON_GPU`) has its weights fetched in a child and then runs as zero_gpu.py says.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from settings import on_zero_gpu

logger = logging.getLogger(__name__)

GRACE = 5.0
"""Seconds for a child to clean up after itself."""

ON_GPU = ("merge_and_measure", "diagnosis", "swept", "classify")
"""Functions of `work` that compute; their first argument is the selection."""

HEARTBEAT = 0.5
"""Seconds after which `Job.events` says that nothing has changed."""


@dataclass(frozen=True)
class Progress:
    """How far a job is: a share of all, and what it is doing."""

    share: float = 0.0
    text: str = "Starting"


@dataclass(frozen=True)
class Done:
    """What the function returned."""

    value: Any


@dataclass(frozen=True)
class Failed:
    """Why there is no result, in a sentence for the page."""

    message: str


Event = Progress | Done | Failed


@dataclass
class Ticket:
    """One visitor's wish: it may be cancelled before it is a process."""

    cancelled: threading.Event = field(default_factory=threading.Event)


def warm_up() -> None:
    """Start the server that children are forked from; it imports `work` while the page is being built."""
    here = str(Path(__file__).parent)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if here not in paths:  # the server's own sys.path does not have this folder
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, paths)])
    context = _context()
    if context.get_start_method() == "forkserver":
        from multiprocessing import forkserver

        context.set_forkserver_preload(["work"])
        forkserver.ensure_running()


def run(function: str, *arguments: Any, ticket: Ticket | None = None, seconds: float | None = None) -> Iterator[Event]:
    """Call `work.function(report, *arguments)` in a child; the last event is Done or Failed.

    Args:
        function: its name, because only children import `work`: this process stays small.
        arguments: plain values.
        ticket: of who waits for it.
        seconds: the time limit.
    """
    ticket = ticket or Ticket()
    if ticket.cancelled.is_set():
        yield Failed("Cancelled before it began.")
        return
    started = time.monotonic()
    last: Event = Progress()
    stream = _with_gpu(function, arguments) if function in ON_GPU and on_zero_gpu() else _child(function, arguments)
    try:
        for last in stream:
            if ticket.cancelled.is_set():
                last = Failed("Cancelled. Nothing was left behind.")
                break
            if seconds is not None and time.monotonic() - started > seconds:
                last = Failed(f"This took longer than the {seconds:g} seconds allowed here, and was stopped.")
                break
            if isinstance(last, Progress):
                yield last
    finally:  # also when the page stops listening
        stream.close()
    yield last


def wait_for(function: str, *arguments: Any, seconds: float | None = None) -> Any:
    """The value of a short job.

    Raises:
        JobError: with the sentence for the page.
    """
    last = list(run(function, *arguments, seconds=seconds))[-1]
    if isinstance(last, Done):
        return last.value
    assert isinstance(last, Failed)
    raise JobError(last.message)


def end_all() -> None:
    """End every child that still works, when the page closes."""
    for process in multiprocessing.active_children():
        process.terminate()
    for process in multiprocessing.active_children():
        process.join(GRACE)


class JobError(Exception):
    """A job failed; the message is a sentence for the page."""


def as_sentence(error: BaseException) -> str:
    """An error's message with a capital and a full stop."""
    text = " ".join(str(error).split())
    text = text[:1].upper() + text[1:] if text.split(" ")[0].isalpha() else text
    return text if text.endswith((".", "!", "?")) else text + "."


def _context() -> Any:
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")


def _child(function: str, arguments: tuple[Any, ...]) -> Generator[Event]:
    """The events of a child, which is ended when this is closed."""
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    event: Event = Progress()
    try:
        while isinstance(event, Progress):
            yield event
            event = _next_event(ours, event)
        yield event
    finally:
        _end(process)
        ours.close()


def _with_gpu(function: str, arguments: tuple[Any, ...]) -> Generator[Event]:
    """The events of a worker with a GPU, once a child without one has fetched what it reads."""
    from zero_gpu import on_gpu

    event: Event = Progress()
    for event in _child("fetch", arguments[:1]):
        if not isinstance(event, Done):
            yield event
    if isinstance(event, Done):
        yield from on_gpu(function, arguments, event.value)


def _next_event(ours: Connection, last: Progress) -> Event:
    try:
        if not ours.poll(HEARTBEAT):
            return last
        event: Event = ours.recv()
        while isinstance(event, Progress) and ours.poll():
            event = ours.recv()  # only the newest matters
        return event
    except (EOFError, OSError):
        return Failed("The work ended without a result; most likely the machine ran out of memory.")


def _end(process: Any) -> None:
    process.join(0.1)
    if process.is_alive():
        process.terminate()
        process.join(GRACE)
    if process.is_alive():
        process.kill()
        process.join()
    process.close()


# --- in the child, or the worker ------------------------------------------------------------------------------------


def _in_child(pipe: Connection, function: str, arguments: tuple[Any, ...]) -> None:
    stopped, sent = False, 0.0

    def stop(number: int, frame: Any) -> None:
        nonlocal stopped
        stopped = True
        raise KeyboardInterrupt

    def report(share: float, text: str) -> None:
        nonlocal sent
        if stopped:
            raise KeyboardInterrupt  # the first one may have come where Python ignores exceptions: in a destructor
        if time.monotonic() - sent > 0.1:
            sent = time.monotonic()
            pipe.send(Progress(share, text))

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the page, which then ends its children
    with suppress(KeyboardInterrupt):  # nobody listens any more
        pipe.send(outcome(function, report, arguments))


def outcome(function: str, report: Callable[[float, str], None], arguments: tuple[Any, ...]) -> Done | Failed:
    """What comes of `work.function(report, *arguments)`, called here."""
    from hf_epimer import EpimerError

    try:
        return Done(getattr(import_module("work"), function)(report, *arguments))
    except (EpimerError, ArithmeticError) as error:
        return Failed(as_sentence(error))
    except MemoryError:
        return Failed("The machine has not enough memory for this.")
    except Exception:
        logger.exception("unexpected error in %s", function)
        return Failed("Something went wrong that nobody foresaw. It has been logged; please try something else.")
