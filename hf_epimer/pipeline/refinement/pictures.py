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
from hf_epimer.models.transfer import has_room
from hf_epimer.pipeline.views import crops
from hf_epimer.tasks.images import Batch

BATCH = 32
"""Pictures at a time where nothing is trained."""

CPU = torch.device("cpu")

Part = tuple[Tensor, Tensor]
"""Pixels [n, 3, h, w] and what is to be made of them [n, d]."""


@dataclass(frozen=True)
class Pictures:
    """Pictures of a task: N to be trained on and M held out. Pixels are whole, in float16: half a grey level is more.

    Attributes:
        pixels: [N, 3, h, w].
        targets: [views, N, d], of every view by the task's own model.
        held_out_pixels: [M, 3, h, w].
        held_out_targets: [1, M, d].
    """

    pixels: Tensor
    targets: Tensor
    held_out_pixels: Tensor
    held_out_targets: Tensor

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
            turn, position = divmod(place, len(self.pixels))
            index = int(np.random.default_rng([seed, turn]).permutation(len(self.pixels))[position])
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
        mine = range(rank, len(self.held_out_pixels), processes)
        for start in range(0, len(mine), BATCH):
            some = list(mine[start : start + BATCH])
            yield self.held_out_pixels[some].float(), self.held_out_targets[0, some]


def write_pictures(
    file: Path,
    label: str,
    images: Iterable[Batch],
    held_out: Iterable[Batch],
    embed: Callable[[Tensor], Tensor],
    views: int,
) -> None:
    """Read images and have the task's own model embed them, those to be trained on in every view.

    Args:
        label: of the task, for messages.
        embed: pixels [n, 3, h, w] -> [n, d].

    Raises:
        DataError: there are none to be trained on, or none held out.
        OutputError: the disk is full.
    """
    pictures = Pictures(*_embedded(label, images, embed, views), *_embedded(label, held_out, embed, 1))
    with atomic_file(file) as unfinished:
        save_file(vars(pictures), unfinished)


def read_pictures(file: Path, device: torch.device = CPU) -> Pictures:
    """What `write_pictures` has written; it stays on the disk until it is used, or on a GPU that has room for it."""
    where = device if has_room(device, file.stat().st_size) else CPU
    return Pictures(**{name: values.to(where) for name, values in load_file(file).items()})


def _embedded(
    label: str, images: Iterable[Batch], embed: Callable[[Tensor], Tensor], views: int
) -> tuple[Tensor, Tensor]:
    """All images in float16, [n, 3, h, w], and what becomes of their views, [views, n, d]."""
    kept: list[Tensor] = []
    embedded: list[Tensor] = []
    count = 0
    for batch in images:
        pixels = batch.inputs.half()
        indices = range(count, count + len(pixels))
        embedded.append(torch.stack([embed(crops(pixels.float(), indices, view)).cpu() for view in range(views)]))
        kept.append(pixels)
        count += len(pixels)
    if not count:
        raise DataError(f"{label}: a refinement needs at least 2 images of every task, one of them to be judged by")
    return torch.cat(kept), torch.cat(embedded, dim=1)
