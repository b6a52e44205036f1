"""The types that every room shares, one definition each."""

from __future__ import annotations

from collections.abc import Callable

Shape = tuple[int, ...]

Progress = Callable[[str, int, int], None]
"""(what is going on, units done since the last call, units in all); 0 done announces a stage."""
