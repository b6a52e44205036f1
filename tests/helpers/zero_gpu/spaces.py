"""A stand-in for the package `spaces` as it is on ZeroGPU, found by a page that has this folder in its path.

What is decorated runs here with its arguments and results pickled, as on their way to a worker and back. Outside of it
CUDA seems to be there, as on ZeroGPU, and whoever touches it ends the process; inside there is none, as on any machine
that tests run on. Every call is noted in the file FAKE_SPACES_LOG: the seconds asked for, and how it ended.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

assert "torch" not in sys.modules, "spaces has to be imported before torch"

import torch  # noqa: E402

inside = False


def _touched(*arguments: Any, **named: Any) -> None:
    if not inside:
        traceback.print_stack()
        os._exit(86)
    raise RuntimeError("there is no GPU")


torch.cuda.is_available = lambda: not inside
torch.cuda._lazy_init = _touched


def _note(line: str) -> None:
    with Path(os.environ["FAKE_SPACES_LOG"]).open("a") as log:
        log.write(f"{line}\n")


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def GPU(duration: Callable[..., float]) -> Callable[..., Any]:
    """Decorate a generator function."""

    def decorate(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @wraps(function)
        def call(*arguments: Any) -> Iterator[Any]:
            global inside
            _note(f"{arguments[0]} {duration(*arguments)}")
            how = "closed"
            inside = True
            results = function(*_pickled(arguments))
            try:
                for result in results:
                    yield _pickled(result)
                how = "ended"
            finally:
                results.close()  # type: ignore[attr-defined]
                inside = False
                _note(f"{arguments[0]} {how}")

        return call

    return decorate


def gradio_auto_wrap(function: Any) -> Any:
    """What gradio passes every function through."""
    return function
