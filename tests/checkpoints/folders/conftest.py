"""Every test of folders works below its own temporary one, with HOME and HF_HOME inside it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from huggingface_hub import constants


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of this machine's user is in reach: the working folder is the test's, and so are HOME and HF_HOME."""
    assert tmp_path.resolve().is_relative_to(Path(tempfile.gettempdir()).resolve())
    home = tmp_path / "people" / "ann"
    (home / "hf" / "hub").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(constants, "HF_HOME", str(home / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf" / "hub"))
    monkeypatch.chdir(tmp_path)
    return home
