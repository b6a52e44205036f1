"""Workspaces of long stages: one run at a time, and what killed runs have left does not fill the disk."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_epimer.errors import OutputError
from hf_epimer.pipeline import workspace
from hf_epimer.pipeline.workspace import workspace_of

PLAN: Any = SimpleNamespace(recipe=SimpleNamespace(device="cpu"), models=[])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(workspace.constants, "HF_HOME", str(tmp_path))
    return tmp_path / "hf-epimer" / "stage"


def opened(setting: int, needed: int = 0) -> Any:
    return workspace_of("stage", PLAN, {}, [setting], needed, "numbers")


def test_two_runs_of_one_merge_do_not_share_it() -> None:
    with opened(1) as first, opened(2) as other:
        assert first != other
        with pytest.raises(OutputError, match="another run is at the stage of this very merge"), opened(1):
            pass
    with opened(1) as again:
        assert again == first


def test_the_oldest_that_nobody_holds_make_room(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "ROOM", 1000)
    left = {}
    for number in (1, 2, 3):
        with opened(number) as left[number]:
            (left[number] / "states").write_bytes(bytes(300))
        os.utime(left[number], (number + 2e9, number + 2e9))  # in the future: none of them is old
    with opened(1), opened(4, needed=500):
        assert {path for path in left.values() if path.exists()} == {left[1], left[3]}
    (home / "about-to-be-locked").mkdir()
    with opened(4, needed=2000) as mine:  # more than there may be: all others go that hold anything
        assert set(home.iterdir()) == {mine, home / "about-to-be-locked"}


def test_what_is_old_goes(home: Path) -> None:
    with opened(1) as old, opened(2) as young:
        pass
    os.utime(old, (0, 0))
    with opened(3):
        assert not old.exists() and young.exists()
