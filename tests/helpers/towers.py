"""Towers and images that calibration and refinement are tried on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from hf_epimer.models.loading import load_tower
from hf_epimer.tasks.images import Batch


def images(seed: int, count: int = 40, batch: int = 16) -> list[Batch]:
    pixels = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).half().float()
    indices = list(range(count))
    return [
        Batch(part, torch.zeros(len(part), dtype=torch.long), indices[start : start + batch])
        for start, part in zip(range(0, count, batch), pixels.split(batch), strict=True)
    ]


def tuned_tower(base: Path, seed: int) -> nn.Module:
    tower = load_tower(base)
    generator = torch.Generator().manual_seed(seed)
    for value in tower.parameters():
        value.data += 0.05 * torch.randn(value.shape, generator=generator)
    return tower


def never() -> Iterator[Batch]:
    raise AssertionError("the images of an interrupted run are read a second time")
    yield
