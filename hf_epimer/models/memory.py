"""What passes through a tower free stays with the process, for the next layer's tensors."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of `mallopt` in glibc's malloc.h."""

KEPT = 2**28
"""Bytes, at most."""


def keep_freed_memory() -> None:
    """Have glibc keep blocks of up to `KEPT` bytes once they are freed; other C libraries are left as they are.

    By itself it gives large blocks back to the system at once, which hands them out again page by page, filled with
    zeros: up to 40% of the time of a forward pass on a processor (docs/benchmarks.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # Windows; macOS and musl have no such function
        return
    mallopt(_M_MMAP_THRESHOLD, KEPT)
    mallopt(_M_TRIM_THRESHOLD, KEPT)
