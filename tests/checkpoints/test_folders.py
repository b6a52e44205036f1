"""Result folders: complete or not there, replaced only where this program wrote them, and nothing left of killed runs.

Every test works below its own temporary folder, with HOME and HF_HOME inside it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file

from helpers.checkpoints import TINY
from hf_epimer.checkpoints import folders
from hf_epimer.checkpoints.folders import atomic_folder, check_target
from hf_epimer.checkpoints.manifest import find_foreign
from hf_epimer.errors import OutputError
from hf_epimer.models.clip import CLIP

RECORD = "merge_config.json"
RECIPE = {"method": "mean", "models": ["a"], "options": {}, "versions": {}}


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


def fill(folder: Path, text: str = "x") -> None:
    (folder / RECORD).write_text(json.dumps(RECIPE))
    (folder / "README.md").write_text(text)
    (folder / "model.safetensors").write_bytes(b"weights")


def result(folder: Path, text: str = "x") -> Path:
    """A folder as a merge leaves it."""
    with atomic_folder(folder, RECORD) as unfinished:
        fill(unfinished, text)
    return folder


def below(folder: Path) -> dict[str, str]:
    """Everything there is: path -> content, or where a link leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = path.read_bytes().hex()
    return found


# --- what may be replaced -------------------------------------------------------------------------------------------


def test_a_folder_that_this_program_wrote_is_replaced(tmp_path: Path) -> None:
    out = result(tmp_path / "out", "old")
    check_target(out, overwrite=True)
    with atomic_folder(out, RECORD, overwrite=True) as folder:
        fill(folder, "new")
    assert (out / "README.md").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "people"]
    (out / "README.md").unlink()  # what is missing cannot be lost
    check_target(out, overwrite=True)


def somebodys(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")


def named_like_ours(folder: Path) -> None:
    folder.mkdir()
    (folder / RECORD).write_text("{}")
    (folder / "model.safetensors").write_text("years of work")


def not_even_json(folder: Path) -> None:
    folder.mkdir()
    (folder / RECORD).write_text("[" * 100_000)


def with_a_note(folder: Path) -> None:
    (result(folder) / "notes.txt").write_text("mine")


def with_an_edited_card(folder: Path) -> None:
    (result(folder) / "README.md").write_text("y")


def with_other_weights(folder: Path) -> None:
    (result(folder) / "model.safetensors").write_bytes(b"longer weights")


def with_an_empty_folder(folder: Path) -> None:
    (result(folder) / "later").mkdir()


def with_a_folder_of_ones_own(folder: Path) -> None:
    (result(folder) / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "README.md").write_text("x")


def with_a_link_for_a_file(folder: Path) -> None:
    (folder.parent / "elsewhere.md").write_text("x")
    (result(folder) / "README.md").unlink()
    (folder / "README.md").symlink_to("../elsewhere.md")


def with_a_record_that_is_a_link(folder: Path) -> None:
    (result(folder) / RECORD).rename(folder.parent / "record.json")
    (folder / RECORD).symlink_to("../record.json")


def from_before_manifests_with_a_note(folder: Path) -> None:
    folder.mkdir()
    fill(folder)
    (folder / "notes.txt").write_text("mine")


FOREIGN: list[tuple[Callable[[Path], None], str]] = [
    (somebodys, "no record of hf-epimer"),
    (named_like_ours, "no record of hf-epimer"),
    (not_even_json, "no record of hf-epimer"),
    (with_a_note, "notes.txt was not written by hf-epimer"),
    (with_an_edited_card, "README.md was changed"),
    (with_other_weights, "model.safetensors was changed"),
    (with_an_empty_folder, "later/ was not written"),
    (with_a_folder_of_ones_own, "checkpoint-1/ was not written"),
    (with_a_link_for_a_file, "README.md is a link"),
    (with_a_record_that_is_a_link, "no record of hf-epimer"),
    (from_before_manifests_with_a_note, "notes.txt was not written"),
]


@pytest.mark.parametrize("way", ["directly", "by a link", "by dots", "by a link and dots"])
@pytest.mark.parametrize(("make", "why"), FOREIGN, ids=[make.__name__ for make, _ in FOREIGN])
def test_what_somebody_else_wrote_is_never_replaced(
    make: Callable[[Path], None], why: str, way: str, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    make(victim)
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("victim")
    (tmp_path / "far" / "link").symlink_to(victim / ".." / "far" / "deep")
    named = {
        "directly": victim,
        "by a link": tmp_path / "link",
        "by dots": tmp_path / "far" / ".." / "victim",
        "by a link and dots": tmp_path / "far" / "link" / ".." / ".." / "victim",
    }[way]
    before = below(tmp_path)
    with pytest.raises(OutputError, match=why) as refused:
        check_target(named, overwrite=True)
    assert str(victim) in str(refused.value)
    with pytest.raises(OutputError, match=why), atomic_folder(named, RECORD, overwrite=True) as folder:
        fill(folder)
    assert below(tmp_path) == before


def test_a_result_from_before_manifests_is_replaced_where_every_name_is_one_of_a_merge(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    check_target(tmp_path / "out", overwrite=True)
    with atomic_folder(tmp_path / "out", RECORD, overwrite=True) as folder:
        fill(folder, "new")
    assert (tmp_path / "out" / "README.md").read_text() == "new"


def test_a_manifest_from_a_stranger_points_nowhere_else(tmp_path: Path) -> None:
    out = result(tmp_path / "out")
    (tmp_path / "precious").write_text("x")
    content = json.loads((out / RECORD).read_text())
    content["files"]["../precious"] = content["files"]["README.md"]
    (out / RECORD).write_text(json.dumps(content))
    records = "merge_config.json, diagnosis.json, sweep.json, conversion.json, landscape.json"
    assert find_foreign(out) == f"it has no record of hf-epimer ({records})"
    with pytest.raises(OutputError), atomic_folder(out, RECORD, overwrite=True) as folder:
        fill(folder)
    assert (tmp_path / "precious").read_text() == "x"


def test_what_comes_into_the_folder_during_the_work_is_not_lost(tmp_path: Path) -> None:
    out = result(tmp_path / "out", "old")
    check_target(out, overwrite=True)
    with pytest.raises(OutputError, match=r"notes.txt was not written"), atomic_folder(out, RECORD, True) as folder:
        fill(folder, "new")
        (out / "notes.txt").write_text("mine")
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "README.md").read_text() == "old"


def test_what_comes_in_while_two_folders_change_places_is_kept_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = result(tmp_path / "out", "old")
    original = folders._exchange

    def exchange(first: Path, second: Path) -> bool:
        (second / "notes.txt").write_text("mine")  # a moment after the last look
        return original(first, second)

    monkeypatch.setattr(folders, "_exchange", exchange)
    with atomic_folder(out, RECORD, overwrite=True) as folder:
        fill(folder, "new")
    assert (out / "README.md").read_text() == "new"
    (kept,) = tmp_path.glob("out-replaced-*")
    assert (kept / "notes.txt").read_text() == "mine"
    assert str(kept) in caplog.text


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


# --- complete or not there ------------------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "partial" in path.name)


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


# --- what others are writing ----------------------------------------------------------------------------------------

HOLDS = """
import sys, time
from pathlib import Path
from hf_epimer.checkpoints.folders import atomic_folder
from hf_epimer.checkpoints.atomic import atomic_file
with atomic_folder(Path("out"), "merge_config.json") as folder, atomic_file(Path("file")) as file:
    (folder / "x").write_text("x")
    file.write_text("x")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_what_a_living_run_writes_is_left_alone_and_goes_when_it_is_killed(tmp_path: Path) -> None:
    from hf_epimer.checkpoints.atomic import write_text

    (tmp_path / ".other.partial-1.aaaaaa").mkdir()
    (tmp_path / ".out.partial-notes").mkdir()  # no process number: not ours
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_text("x")
    (tmp_path / ".out.partial-2.bbbbbb").symlink_to("precious")
    kept = [".other.partial-1.aaaaaa", ".out.partial-2.bbbbbb", ".out.partial-notes"]
    process = subprocess.Popen([sys.executable, "-c", HOLDS], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    theirs = [Path(process.stdout.readline().strip()).name]
    theirs += [path.name for path in tmp_path.glob(".file.partial-*")]
    result(tmp_path / "out")
    write_text(tmp_path / "file", "mine")
    assert leftovers(tmp_path) == sorted([*kept, *theirs])
    process.kill()
    process.wait()
    with atomic_folder(tmp_path / "out", RECORD, overwrite=True) as folder:
        fill(folder)
    write_text(tmp_path / "file", "mine")
    assert leftovers(tmp_path) == kept
    assert (tmp_path / "precious" / "x").read_text() == "x"


def test_without_locks_the_process_number_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_epimer.checkpoints import atomic

    monkeypatch.setattr(atomic, "fcntl", None)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (dead.pid, os.getppid()):
        (tmp_path / f".out.partial-{process}.aaaaaa").mkdir()
    result(tmp_path / "out")
    assert leftovers(tmp_path) == [f".out.partial-{os.getppid()}.aaaaaa"]


SLOW_MERGE = """
import sys, time
from hf_epimer.cli.main import main
from hf_epimer.merging import stream
from hf_epimer.pipeline import merge as pipeline
original = stream.merge_layers
def slowly(*args, **kwargs):
    for layer in original(*args, **kwargs):
        time.sleep(0.02)
        yield layer
pipeline.merge_layers = slowly
print("ready", flush=True)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("delay", [0.05, 0.35, 0.7])
def test_an_interrupted_merge_leaves_the_target_complete_or_absent(
    number: signal.Signals, delay: float, tiny_zoo: Path
) -> None:
    out = tiny_zoo / "out"
    words = ["merge", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--out", out]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_MERGE, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    deadline = time.monotonic() + 20
    while not leftovers(tiny_zoo) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(number)
    _, complaint = process.communicate(timeout=30)
    if out.exists():
        assert set(load_file(out / "model.safetensors")) == set(CLIP.shapes(TINY))
        assert (out / "README.md").exists()
    else:
        assert process.returncode != 0
    if number != signal.SIGKILL:
        assert not leftovers(tiny_zoo)
        if not out.exists():
            assert complaint == "error: interrupted; nothing half-written was left behind\n"
