"""Refinement in float32, and a command that refines."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_epimer.pipeline.refinement import training


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, whatever this machine is fast at."""
    monkeypatch.setattr(training, "has_bfloat16", lambda device: False)


@pytest.fixture
def words(clip_zoo: Path, own_home: Path) -> tuple[object, ...]:
    tasks = ("--task", clip_zoo / "a.json", clip_zoo / "b.json")
    models = (f"a={clip_zoo / 'a'}", f"b={clip_zoo / 'b'}", "--base", clip_zoo / "base")
    return ("merge", *models, *tasks, "--method", "mean", "--samples", 40, "--refine", "--refine-steps", 30)
