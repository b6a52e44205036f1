"""Calibration on a stand-in for a GPU: to the numbers of the CPU, and nobody waits more often than need be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.accelerator import DEVICE, StandIn
from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.models.clip import CLIP
from hf_epimer.models.loading import load_tower
from hf_epimer.models.weights import blocks_of, parameters_of
from hf_epimer.pipeline.calibration import passage
from hf_epimer.pipeline.calibration.passage import CalibrationTask
from hf_epimer.pipeline.calibration.step import calibrate
from hf_epimer.tasks.images import Batch

LAYERS, POSITIONS, TASKS = 12, 5, 2


def calibrated(base: Path, folder: Path, images: int, views: int = 1, device: torch.device = DEVICE) -> nn.Module:
    """A calibration of a tower on a device, of weights and images that are on the CPU."""
    tower = load_tower(base)
    weights = StateDict("base", {name: value.detach().clone() for name, value in parameters_of(tower, CLIP).items()})
    tuned = StateDict("tuned", {name: 1.1 * weights.tensor(name) for name in weights.shapes})
    heard = StateDict("heard", {f"{name}.positions": torch.ones(POSITIONS) for name in weights.shapes})
    pixels = torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = Batch(pixels, torch.zeros(images, dtype=torch.long), range(images))
    tasks = [CalibrationTask(tuned, 1 / TASKS, heard, [seen])] * TASKS
    calibrate(tower.to(device), weights, tasks, CLIP, folder, in_memory=True, views=views)
    return tower


def test_calibration_waits_for_what_it_tells_and_writes_alone(clip_base: Path, tmp_path: Path) -> None:
    """Whether a step is finite, its size, and weights of solved blocks; not for a batch of images."""
    written = sum(len(block.parameters) for block in blocks_of(load_tower(clip_base), CLIP))
    for images in (32, 64):
        with StandIn() as device:
            calibrated(clip_base, tmp_path / f"{images}", images)
        assert device.waits == 2 * LAYERS + written


def test_images_go_to_the_device_once(clip_base: Path, tmp_path: Path) -> None:
    def sent(images: int, views: int) -> int:
        with StandIn() as device:
            calibrated(clip_base, tmp_path / f"{images} {views}", images, views)
        return device.sent

    few, many, cropped = sent(32, 1), sent(64, 1), sent(64, 2)
    assert many - few == TASKS * 32 * 3 * 8 * 8
    assert cropped - many == TASKS * 64 * 3  # where the crops are


@pytest.mark.parametrize("float64", [True, False])
def test_the_weights_are_those_of_the_cpu(
    float64: bool, clip_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = calibrated(clip_base, tmp_path / "a", 32, views=2, device=torch.device("cpu"))
    if not float64:
        monkeypatch.setattr(passage, "_precise", on_the_cpu)
    with StandIn(float64=float64):
        found = calibrated(clip_base, tmp_path / "b", 32, views=2).to("cpu")
    for name, value in wanted.named_parameters():
        assert torch.allclose(found.get_parameter(name), value, atol=1e-5), name


def on_the_cpu(sums: Tensor) -> Tensor:
    """As on Apple's GPUs."""
    return sums.cpu().double()
