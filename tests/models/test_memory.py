"""What is freed is kept where the C library can be told so, and nothing happens elsewhere."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from hf_epimer.models.memory import KEPT, keep_freed_memory


def test_glibc_is_told_both_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[int, int] = {}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=told.__setitem__))
    keep_freed_memory()
    assert told == {-1: KEPT, -3: KEPT}


@pytest.mark.parametrize("library", [SimpleNamespace(), None])
def test_other_libraries_are_left_alone(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: None) -> Any:
        if library is None:
            raise TypeError("no name")
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    keep_freed_memory()
