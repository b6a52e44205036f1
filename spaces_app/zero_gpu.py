"""Heavy work on a ZeroGPU Space: in a worker that `spaces` forks for it, which has a GPU for the seconds asked for.

    page  --function, arguments, pickled-->  worker      worker  --Progress ..., then Done or Failed, pickled-->  page

ZeroGPU gives the GPU to decorated functions of the page's own process, so children that end by signal (jobs.py) do not
see it. What takes their place:

Cancel   closes the generator; the worker hears of it at its next event, at most `HEARTBEAT` later, and the work unwinds
         like after Ctrl-C at its next report. A single long step (one layer, one batch) is not broken off in between.
limit    the seconds asked for. The page closes the generator then; if that is of no use, the Hub ends the worker.
crash    ends the worker, and the page says so.

Checkpoints are fetched before, in a child without a GPU, and what is asked for is reckoned from what was found there:
a visitor's daily seconds are not spent on downloads. Nothing here or in the page's process touches CUDA. Imported on
ZeroGPU only, before torch, which `spaces` prepares.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from typing import Any

import gradio as gr
import spaces
import work as work  # here, so that workers, which are forked, have it with all its libraries
from jobs import HEARTBEAT, Event, Failed, Progress, as_sentence, outcome

SHORTEST, LONGEST = 20, 120
"""Seconds that may be asked for; the Hub gives a visitor a few minutes a day."""

START = 15
"""Seconds until a worker has CUDA and the first kernels."""

SECONDS_PER_GIGABYTE = 6
"""Of weights: read, moved, decomposed. Estimated from two CPU cores, not measured on a GPU; so are the next two."""

IMAGES_PER_SECOND = 100
CALIBRATION = 45


def gpu_seconds(function: str, arguments: tuple[Any, ...], size: dict[str, Any]) -> int:
    """How long the GPU is asked for, from the plan of the work.

    Args:
        function, arguments: of `work`.
        size: what `work.fetch` says of the checkpoints: how many `models`, and their `bytes`.
    """
    seconds = START + SECONDS_PER_GIGABYTE * size["bytes"] / 1e9
    if function == "merge_and_measure":
        _, _, _, calibrate, images, *_ = arguments
        # the merge, the base, two baselines, and every fine-tuned model on its own task
        seconds += 5 * size["models"] * (images or 0) / IMAGES_PER_SECOND + CALIBRATION * bool(calibrate)
    elif function == "swept":
        _, methods, ranks, alphas, images, *_ = arguments
        settings = len(methods) * max(1, len(ranks)) * len(alphas)
        seconds += settings * size["models"] * images / IMAGES_PER_SECOND
    return round(min(LONGEST, max(SHORTEST, seconds)))


@spaces.GPU(duration=gpu_seconds)
def in_worker(function: str, arguments: tuple[Any, ...], size: dict[str, Any]) -> Generator[Event]:
    """Call `work.function(report, *arguments)`, in the worker; the last event is Done or Failed."""
    events: queue.Queue[Event] = queue.Queue()
    stopped = threading.Event()

    def report(share: float, text: str) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        events.put(Progress(share, text))

    def run() -> None:
        with suppress(KeyboardInterrupt):  # nobody listens any more
            events.put(outcome(function, report, arguments))

    worker = threading.Thread(target=run)
    worker.start()
    event: Event = Progress()
    try:
        while isinstance(event, Progress):
            try:
                event = events.get(timeout=HEARTBEAT)
                while isinstance(event, Progress) and not events.empty():
                    event = events.get()  # only the newest matters
            except queue.Empty:
                pass  # the same again, so that Cancel is heard
            yield event
    finally:
        stopped.set()
        worker.join()


def on_gpu(function: str, arguments: tuple[Any, ...], size: dict[str, Any]) -> Generator[Event]:
    """The events of `in_worker`; what ZeroGPU itself has to say, such as that a quota is used up, is a Failed."""
    granted = gpu_seconds(function, arguments, size)
    started = None
    events = in_worker(function, arguments, size)
    try:
        for event in events:
            started = started or time.monotonic()  # before, it waited for a GPU
            if isinstance(event, Progress) and time.monotonic() - started > granted:
                yield Failed(f"This took longer than the {granted} seconds of GPU time asked for, and was stopped.")
                break
            yield event
    except gr.Error as error:
        yield Failed(as_sentence(Exception(re.sub(r"<[^>]+>", "", str(error.message)))))
    finally:
        events.close()
