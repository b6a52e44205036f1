"""Calibration on a stand-in for a GPU: nothing is left behind on the CPU, and nobody waits more often than need be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.accelerator import DEVICE, StandIn
from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.models.clip import CLIP
from hf_epimer.models.loading import load_tower
from hf_epimer.models.weights import parameters_of
from hf_epimer.pipeline.calibration import passage, step
from hf_epimer.pipeline.calibration.passage import CalibrationTask
from hf_epimer.tasks.images import Batch

LAYERS, POSITIONS, TASKS = 12, 5, 2


def calibrated(base: Path, folder: Path, images: int, views: int = 1) -> StandIn:
    """A calibration of a tower on the device, of weights and images that are on the CPU."""
    tower = load_tower(base)
    weights = StateDict("base", {name: value.detach().clone() for name, value in parameters_of(tower, CLIP).items()})
    tuned = StateDict("tuned", {name: 1.1 * weights.tensor(name) for name in weights.shapes})
    heard = StateDict("heard", {f"{name}.positions": torch.ones(POSITIONS) for name in weights.shapes})
    seen = Batch(torch.ones(images, 3, 8, 8), torch.zeros(images, dtype=torch.long), range(images))
    tasks = [CalibrationTask(tuned, 1 / TASKS, heard, [seen])] * TASKS
    with pytest.MonkeyPatch.context() as patch, StandIn() as device:
        patch.setattr(step, "keep_block", lambda block, sizes, path: None)  # there are no numbers to be written
        step.calibrate(tower.to(DEVICE), weights, tasks, CLIP, folder, in_memory=True, views=views)
    return device


def test_calibration_waits_once_to_see_a_step_and_once_to_measure_it(clip_base: Path, tmp_path: Path) -> None:
    assert calibrated(clip_base, tmp_path, 32).waits == 2 * LAYERS
    assert calibrated(clip_base, tmp_path, 64).waits == 2 * LAYERS


def test_images_go_to_the_device_once(clip_base: Path, tmp_path: Path) -> None:
    few, many, cropped = (calibrated(clip_base, tmp_path, *given).sent for given in ((32,), (64,), (64, 2)))
    assert many - few == TASKS * 32 * 3 * 8 * 8
    assert cropped - many == TASKS * 64 * 3  # where the crops are


def test_sums_may_be_on_the_cpu_where_a_device_has_no_float64(
    clip_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_the_cpu(sums: Tensor) -> Tensor:
        return sums.cpu().double()

    monkeypatch.setattr(passage, "_precise", on_the_cpu)
    calibrated(clip_base, tmp_path, 32)
