"""A refinement on a stand-in for a GPU, begun and gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.accelerator import DEVICE, StandIn
from helpers.towers import images, tuned_tower
from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.models.classifier import ZeroShotHead
from hf_epimer.models.clip import CLIP
from hf_epimer.models.loading import load_tower
from hf_epimer.models.weights import parameters_of
from hf_epimer.pipeline.refinement import pictures, training
from hf_epimer.pipeline.refinement.training import PICTURES, RefinementTask, refine

TASKS = 2


def refined(base: Path, folder: Path, device: torch.device, steps: int, **options: Any) -> nn.Module:
    folder.mkdir(exist_ok=True)
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    tasks = []
    for seed in range(1, TASKS + 1):
        own = {name: value.detach().clone() for name, value in parameters_of(tuned_tower(base, seed), CLIP).items()}
        head = ZeroShotHead(torch.eye(16), rows, torch.tensor(2.0)).to(device)
        task = RefinementTask(f"task {seed}", StateDict("tuned", own), 1 / TASKS, images(seed), images(100, 20), head)
        tasks.append(task)
    tower = load_tower(base).to(device)
    refine(tower, tasks, CLIP, folder, steps=steps, **options)
    return tower.to("cpu")


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "has_bfloat16", lambda device: False)


def test_the_weights_are_those_of_the_cpu(clip_base: Path, tmp_path: Path) -> None:
    wanted = refined(clip_base, tmp_path / "a", torch.device("cpu"), steps=4)

    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if (tmp_path / "b" / "state.safetensors").exists():
            raise Killed

    with StandIn(float64=False):
        with pytest.raises(Killed):
            refined(clip_base, tmp_path / "b", DEVICE, steps=4, on_step=kill)
        found = refined(clip_base, tmp_path / "b", DEVICE, steps=4)
    for name, value in wanted.named_parameters():
        # no loss hears of keys' biases, so that their steps are those of rounding
        assert name.endswith("k_proj.bias") or torch.allclose(found.get_parameter(name), value, atol=1e-6), name


def test_pictures_go_to_the_device_once_where_it_has_room(
    clip_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with every step."""

    def sent(folder: str, steps: int) -> int:
        with StandIn() as device:
            refined(clip_base, tmp_path / folder, DEVICE, steps=steps)
        return device.sent

    pixels = PICTURES * TASKS * 3 * 8 * 8
    assert sent("b", 2) - sent("a", 1) > pixels
    monkeypatch.setattr(pictures, "has_room", lambda device, nbytes: True)
    assert sent("d", 2) - sent("c", 1) < pixels / 4
