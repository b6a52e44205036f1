"""A command that calibrates."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def words(clip_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    tasks = ("--task", clip_zoo / "a.json", clip_zoo / "b.json")
    models = (f"a={clip_zoo / 'a'}", f"b={clip_zoo / 'b'}", "--base", clip_zoo / "base")
    return ("merge", *models, *tasks, "--method", "tsv-m", "--samples", 24, "--calibrate")
