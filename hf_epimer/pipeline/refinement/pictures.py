"""The pictures of one task and what its own tower makes of them, in one file: read and embedded once, then mapped.

Every view of a picture is a fixed one, so that the task's own tower has nothing to do in the training loop, and no more
than one tower is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_epimer.checkpoints.atomic import atomic_file
from hf_epimer.errors import DataError
from hf_epimer.pipeline.views import crops
from hf_epimer.tasks.images import Batch

BATCH = 32
"""Pictures at a time where nothing is trained."""

HELD_OUT = 10
"""One picture in so many is not trained on."""

Part = tuple[Tensor, Tensor]
"""Pixels [n, 3, h, w] and what is to be made of them [n, d]."""


@dataclass(frozen=True)
class Pictures:
    """Pictures of a task, the last of them held out.

    Attributes:
        pixels: [N, 3, h, w], whole, in float16: half a grey level is more than what that loses.
        targets: [views, N, d], of every view by the task's own model.
    """

    pixels: Tensor
    targets: Tensor

    @property
    def trained_on(self) -> int:
        """How many are not held out."""
        return len(self.pixels) - max(1, len(self.pixels) // HELD_OUT)

    def batch(self, step: int, size: int, seed: int, share: tuple[int, int]) -> Part:
        """A process's share of what is trained on in a step.

        All pictures are taken in an order of chance, then all of them in another one, each time in its next view.

        Args:
            size: of all shares.
            share: (number of the process, number of processes).
        """
        rank, processes = share
        chosen = []
        for place in range(step * size + rank, (step + 1) * size, processes):
            turn, position = divmod(place, self.trained_on)
            index = int(np.random.default_rng([seed, turn]).permutation(self.trained_on)[position])
            chosen.append(((turn + index) % len(self.targets), index))
        chosen.sort()  # by view
        pixels = [self.pixels[:0].float()]
        for view, pairs in groupby(chosen, key=lambda pair: pair[0]):
            indices = [index for _, index in pairs]
            pixels.append(crops(self.pixels[indices].float(), indices, view))
        views, indices = ([pair[side] for pair in chosen] for side in (0, 1))
        return torch.cat(pixels), self.targets[views, indices]

    def held_out(self, share: tuple[int, int]) -> Iterator[Part]:
        """A process's share of what is not trained on, whole."""
        rank, processes = share
        indices = range(self.trained_on + rank, len(self.pixels), processes)
        for start in range(0, len(indices), BATCH):
            some = list(indices[start : start + BATCH])
            yield self.pixels[some].float(), self.targets[0, some]


def write_pictures(
    file: Path, label: str, images: Iterable[Batch], embed: Callable[[Tensor], Tensor], views: int
) -> None:
    """Read images and have the task's own model embed every view of them.

    Args:
        label: of the task, for messages.
        embed: pixels [n, 3, h, w] -> [n, d].

    Raises:
        DataError: there are too few to hold one of them out.
        OutputError: the disk is full.
    """
    kept: list[Tensor] = []
    embedded: list[Tensor] = []
    count = 0
    for batch in images:
        pixels = batch.inputs.half()
        indices = range(count, count + len(pixels))
        embedded.append(torch.stack([embed(crops(pixels.float(), indices, view)).cpu() for view in range(views)]))
        kept.append(pixels)
        count += len(pixels)
    if count < 2:
        raise DataError(f"{label}: {count} images; a refinement needs at least 2, one of them to hold out")
    with atomic_file(file) as unfinished:
        save_file({"pixels": torch.cat(kept), "targets": torch.cat(embedded, dim=1)}, unfinished)


def read_pictures(file: Path) -> Pictures:
    """What `write_pictures` has written; it stays on the disk until it is used."""
    return Pictures(**load_file(file))
