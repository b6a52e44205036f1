"""What a merge takes: the seconds of its stages, and the peak of its memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Usage:
    """Seconds by stage, in the order in which the stages ended, and peak memory."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._anonymous = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        started = time.monotonic()
        yield
        self._seconds[name] = time.monotonic() - started

    def note_memory(self) -> None:
        """Look at what the process holds now; the system keeps no peak of memory that no file backs."""
        self._anonymous = max(self._anonymous, process_memory("RssAnon"))

    def seconds(self) -> dict[str, float]:
        """Of every stage so far, and their sum as `total`."""
        return {**self._seconds, "total": sum(self._seconds.values())}

    def memory(self) -> dict[str, int]:
        """Peak bytes: anonymous, where they were noted, and resident."""
        return {"peak_anonymous": self._anonymous, "peak_resident": process_memory("VmHWM")}


def process_memory(field: str) -> int:
    """A memory figure of this process in bytes (RssAnon: backed by no file; VmHWM: peak); 0 where not told."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            line = next(line for line in status if line.startswith(field))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024
