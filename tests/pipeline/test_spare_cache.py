"""A merge where our own small caches cannot be written: heads and statistics are kept for the run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.command import Run
from helpers.curvature import fisher_words, merge_words
from hf_epimer.checkpoints.cache import remove_spare


def test_a_cache_that_cannot_be_written_changes_no_merge(
    clip_zoo: Path, own_home: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_spare()  # of a test before this one
    assert run(*merge_words(clip_zoo), "--out", "kept")[0] == 0
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    own_home.rename(tmp_path / "away")
    own_home.write_text("a file where the caches should be")
    code, _, complaint = run(*merge_words(clip_zoo), "--out", "not-kept")
    assert code == 0, complaint
    assert f"cannot write {own_home}/statistics" in complaint
    assert "kept for this run only (HF_HOME names another folder)" in complaint
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("kept", "not-kept"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for form in ("none", "bf16"):
        words = [] if form == "none" else ["--compress", form]
        code, _, complaint = run(*fisher_words(clip_zoo, "a"), *words, "--out", f"{form}.safetensors")
        assert code == 0, complaint
    assert list(spare.iterdir())
    remove_spare()
    assert not list(spare.iterdir())
