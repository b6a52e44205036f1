"""A whole merge by the command, on a stand-in for a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.accelerator import DEVICE, StandIn, solve_here
from helpers.command import Run
from hf_epimer.pipeline import planner
from hf_epimer.pipeline.calibration import layers


@pytest.mark.parametrize("room", [True, False])
def test_a_merge_is_that_of_the_cpu(
    room: bool, clip_zoo: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Solved, calibrated with hidden states on the device or in files, and refined."""
    solve_here(monkeypatch)
    monkeypatch.setattr(planner, "_device_works", lambda device: True)
    monkeypatch.setattr(layers, "has_room", lambda device, nbytes: room and device == DEVICE)
    words: list[object] = ["merge", f"a={clip_zoo / 'a'}", f"b={clip_zoo / 'b'}", "--base", clip_zoo / "base"]
    words += ["--task", clip_zoo / "a.json", clip_zoo / "b.json", "--method", "tsv-m", "--samples", 24]
    words += ["--calibrate", "--refine", "--refine-steps", 2]
    code, _, err = run(*words, "--out", tmp_path / "a")
    assert code == 0, err
    with StandIn() as device:
        code, _, err = run(*words, "--device", DEVICE, "--out", tmp_path / "b")
    assert code == 0, err
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert device.waits and wanted.keys() == found.keys()
    for name, value in wanted.items():  # keys' biases take steps of rounding; the CPU may train in bfloat16
        assert torch.allclose(found[name], value, atol=1e-3), name
