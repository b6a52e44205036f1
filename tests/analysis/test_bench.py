"""The bench of a sweep: pictures are decoded once, weights put in once, whatever fits into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.sweeps import recipe
from hf_epimer import Grid, sweep
from hf_epimer.analysis.sweep import bench
from hf_epimer.analysis.sweep.bench import Bench
from hf_epimer.tasks import images as data

pytestmark = pytest.mark.usefixtures("own_cache")


def test_pictures_are_decoded_once_in_bounded_memory(clip_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = data.decode
    monkeypatch.setattr(data, "decode", lambda value: decoded.append(1) or decode(value))
    loads: list[int] = []
    load = Bench._load

    def noted(self: Bench, *more: Any) -> None:
        loads.append(1)
        load(self, *more)

    monkeypatch.setattr(Bench, "_load", noted)
    grid = Grid(("mean", "task-arithmetic"), alphas=(0.1, 0.3, 0.5, 0.7))
    whole = sweep(recipe(clip_zoo), grid, "whole")
    assert len(decoded) == 8
    assert len(loads) == len(whole.rows)  # all tasks on one loading
    loads.clear()
    monkeypatch.setattr(bench, "MEMORY_FOR_PIXELS", 1)
    monkeypatch.setattr(bench, "BATCH", 3)
    parts = sweep(recipe(clip_zoo), grid, "parts")
    assert len(decoded) == 16
    assert len(loads) == 2 * len(parts.rows) * 2  # tasks, settings, batches that had to be let go
    assert [row.tasks for row in parts.rows] == [row.tasks for row in whole.rows]


@pytest.mark.parametrize("shares", [(), (0.5,)])
def test_broken_pictures_are_counted_over_all_parts(
    shares: tuple[float, ...], clip_zoo: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At most a share of the task's pictures, however many parts they are read in; all settings lose the same."""
    decode, begun = data.decode, [0]

    def damaged(value: Any) -> Any:
        begun[0] += 1
        if begun[0] % 2:
            raise ValueError("torn")
        return decode(value)

    monkeypatch.setattr(data, "decode", damaged)
    monkeypatch.setattr(data.os, "cpu_count", lambda: 1)  # in order
    monkeypatch.setattr("hf_epimer.analysis.sweep.sweep.SHARES", shares)
    grid = Grid(("task-arithmetic",), alphas=(0.3, 0.5))
    monkeypatch.setattr(data, "BROKEN_SHARE", 0.5)
    found = sweep(recipe(clip_zoo), grid, "half", stop_hopeless=True)
    assert [result.samples for row in found.rows for result in row.tasks.values()] == [2] * 4
    assert "2 images" in caplog.text if not shares else "1 images" in caplog.text
    monkeypatch.setattr(data, "BROKEN_SHARE", 0.25)
    with pytest.raises(data.DataError, match=r"2 of 4 images of task 'a' cannot be decoded"):
        sweep(recipe(clip_zoo), grid, "less", stop_hopeless=True)
