"""Places where no result is ever put."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from helpers.result_folders import RECORD, fill, result
from hf_epimer.checkpoints.folders import atomic_folder, check_target
from hf_epimer.errors import OutputError


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("people/ann", "your home folder"),
        ("people", "your home folder"),
        ("people/ann/../ann", "your home folder"),
        ("to-ann", "your home folder"),
        ("people/ann/hf", "HF_HOME"),
        ("people/ann/hf/hub", "the Hub's cache"),
        ("/", "is a root"),
        ("people/../../../../../../../../../..", "is a root"),
        (".", "holds|is or holds"),
    ],
)
def test_places_that_are_never_a_result(named: str, why: str, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "to-ann").symlink_to("people/ann")
    with pytest.raises(OutputError, match=why):
        check_target(tmp_path / named, overwrite)


def test_the_home_that_the_system_knows_of_is_safe_whatever_HOME_says() -> None:
    home = Path(os.path.expanduser(f"~{subprocess.run(['id', '-un'], capture_output=True, text=True).stdout.strip()}"))
    assert home.is_absolute() and str(home) != os.environ["HOME"]
    with pytest.raises(OutputError, match="your home folder"):
        check_target(home, overwrite=True)


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = tmp_path / "disk"
    mounted.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == mounted)
    for named in (mounted, mounted / "below" / ".."):
        with pytest.raises(OutputError, match="mount point"):
            check_target(named, overwrite=True)
    check_target(mounted / "below", overwrite=False)


def test_a_parent_of_an_input_is_refused_through_links(tmp_path: Path) -> None:
    out = result(tmp_path / "out")
    (tmp_path / "model").symlink_to("out/README.md")
    with pytest.raises(OutputError, match="would be lost"):
        check_target(out, True, [tmp_path / "model"])
    check_target(out, True, [tmp_path / "people"])


def test_a_name_that_no_folder_can_have(tmp_path: Path) -> None:
    for name in ("x" * 300, "x" * 300 + "/out", "a\0b"):
        with pytest.raises(OutputError):
            check_target(tmp_path / name, overwrite=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        check_target(tmp_path / "file" / "out", overwrite=False)


def test_a_long_name_is_written_all_the_same(tmp_path: Path) -> None:
    out = result(tmp_path / ("模" * 80), "old")
    with atomic_folder(out, RECORD, overwrite=True) as folder:
        fill(folder, "new")
    assert (out / "README.md").read_text() == "new"
