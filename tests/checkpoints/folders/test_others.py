"""What other runs are writing is left alone, and what killed ones have left goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.checkpoints import TINY
from helpers.result_folders import RECORD, fill, leftovers, result
from hf_epimer.checkpoints.folders import atomic_folder
from hf_epimer.models.clip import CLIP

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
