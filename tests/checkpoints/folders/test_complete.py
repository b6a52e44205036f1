"""A result folder is complete or not there, whatever fails on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.result_folders import RECORD, fill, leftovers, result
from hf_epimer.checkpoints import folders
from hf_epimer.checkpoints.folders import atomic_folder, check_target
from hf_epimer.checkpoints.manifest import find_foreign
from hf_epimer.errors import OutputError


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    for written in ("x", RECORD):
        with pytest.raises(RuntimeError), atomic_folder(tmp_path / "new" / "sub" / "out", RECORD) as folder:
            fill(folder)
            (folder / f"{written}.tmp").write_text("x")
            raise RuntimeError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["people"]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    result(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "README.md").read_text() == "x"


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "out", RECORD) as folder:
            fill(folder)
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["people"]


@pytest.mark.slow
def test_a_really_full_disk(tiny_zoo: Path) -> None:
    """A limit on file sizes makes the operating system refuse the write itself."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "from hf_epimer.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["merge", tiny_zoo / "a", "--base", tiny_zoo / "base", "--method", "mean", "--out", tiny_zoo / "o"]
    done = subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tiny_zoo.iterdir()) == ["a", "b", "base", "c"]


def test_a_folder_that_is_filled_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="filled by something else"),
        atomic_folder(tmp_path / "out", RECORD) as folder,
    ):
        fill(folder)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("old")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    assert not leftovers(tmp_path)


WATCHED_MERGE = """
import os, sys
from pathlib import Path
from hf_epimer.checkpoints import folders
step, can_exchange = sys.argv[1], sys.argv[2] == "yes"
def die(*args):
    os._exit(9)
original = folders._exchange
def exchange(first, second):
    done = original(first, second) if can_exchange else False
    if step == "exchanged":
        die()
    return done
folders._exchange = exchange
replace = os.replace
def watched(source, target):
    if step == "second rename" and Path(target).name == "out":
        die()
    replace(source, target)
if step == "second rename":
    os.replace = watched
if step == "removing":
    folders.remove_ours = die
with folders.atomic_folder(Path("out"), "merge_config.json", overwrite=True) as folder:
    (folder / "merge_config.json").write_text('{"method": "mean", "models": ["a"], "options": {}, "versions": {}}')
    (folder / "README.md").write_text("new")
    if step == "writing":
        die()
"""


@pytest.mark.slow
@pytest.mark.parametrize("can_exchange", ["yes", "no"])
@pytest.mark.parametrize("step", ["writing", "exchanged", "second rename", "removing"])
def test_a_run_killed_at_any_step_of_an_overwrite_loses_nothing(step: str, can_exchange: str, tmp_path: Path) -> None:
    """With the exchange there is a complete folder at any moment; without, the next run puts the old one back."""
    out = result(tmp_path / "out", "old")
    killed = subprocess.run([sys.executable, "-c", WATCHED_MERGE, step, can_exchange], cwd=tmp_path)
    if (step, can_exchange) == ("second rename", "yes"):
        assert killed.returncode == 0  # there is none
        assert (out / "README.md").read_text() == "new"
        return
    assert killed.returncode == 9
    assert leftovers(tmp_path)
    if can_exchange == "yes":
        assert (out / "README.md").read_text() == ("old" if step == "writing" else "new")
        assert find_foreign(out) is None
    with pytest.raises(RuntimeError), atomic_folder(out, RECORD, overwrite=True):
        raise RuntimeError
    assert not leftovers(tmp_path)
    is_new = step == "removing" or (step, can_exchange) == ("exchanged", "yes")
    assert (out / "README.md").read_text() == ("new" if is_new else "old")
    assert find_foreign(out) is None


def test_an_old_result_that_comes_back_is_found_before_the_work(tmp_path: Path) -> None:
    result(tmp_path / "out", "old").rename(tmp_path / f".out.partial-{2**22 + 1}.aaaaaa.old")
    check_target(tmp_path / "out", overwrite=False)
    with pytest.raises(OutputError, match="it is back now"), atomic_folder(tmp_path / "out", RECORD):
        pytest.fail("the work has begun")
    assert (tmp_path / "out" / "README.md").read_text() == "old"


def test_this_system_exchanges_in_one_step(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("renameat2 is Linux'")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    assert folders._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").read_text() == "b"
    with pytest.raises(FileNotFoundError):
        folders._exchange(tmp_path / "a", tmp_path / "c")


def test_where_the_second_rename_fails_the_first_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = result(tmp_path / "out", "old")
    monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    replace = os.replace

    def fails_once(source: Path, target: Path) -> None:
        if Path(target) == out and "README.md" in os.listdir(source) and (source / "README.md").read_text() == "new":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(OutputError, match="Input/output error"), atomic_folder(out, RECORD, overwrite=True) as folder:
        fill(folder, "new")
    assert (out / "README.md").read_text() == "old"
    assert not leftovers(tmp_path)
