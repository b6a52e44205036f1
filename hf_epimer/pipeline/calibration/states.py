"""The pictures of one task on their way through two towers, block by block: the merged one and the task's own.

Hidden states are kept in files that are mapped into memory; a block is passed as often as its stages need. Every
picture is seen several times, whole and as random crops: no label is used, so whatever a crop shows, each task's own
tower says what is to become of it, and a few hundred pictures are few for layers that are heard at one position only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.errors import DataError
from hf_epimer.models.architecture import Architecture
from hf_epimer.models.weights import Block, parameters_of, put_weights
from hf_epimer.tasks.images import Batch

BATCH = 32
"""Images at a time."""

SMALLEST = 0.6
"""Of a picture's area: the smallest crop."""


class Run:
    """Hidden states of one task's images before some block: in the merged tower and in the task's own."""

    def __init__(
        self, merged: Tensor, tuned: Tensor, device: torch.device, run_block: Callable[[nn.Module, Tensor], Tensor]
    ) -> None:
        self.merged, self.tuned, self.device, self.run_block = merged, tuned, device, run_block

    def batches(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(which images, merged, tuned) hidden states, some images at a time."""
        for start in range(0, len(self.merged), BATCH):
            part = slice(start, start + BATCH)
            yield part, self.merged[part].to(self.device), self.tuned[part].to(self.device)

    def advance(self, block: Block) -> None:
        """Through a block of the merged tower; the tuned states are put forward by the block's last stage."""
        for part, merged, _ in self.batches():
            self.merged[part] = self.run_block(block.module, merged)


def start_run(
    towers: tuple[nn.Module, nn.Module],
    first_blocks: tuple[Block, Block],
    weights: TensorSource,
    images: Iterable[Batch],
    views: int,
    architecture: Architecture,
    workspace: Path,
) -> Run:
    """Through both towers up to their first block.

    Args:
        towers: the merged one and the one for the task's weights.
        first_blocks: of both.
        weights: the task's own.
        images: read once.
        views: how often each is seen.
        workspace: a new folder for hidden states.

    Raises:
        DataError: there are none.
    """
    inside = f"{architecture.prefix}{architecture.blocks}."
    parameters = parameters_of(towers[1], architecture)
    put_weights({name: value for name, value in parameters.items() if not name.startswith(inside)}, weights)
    device = next(towers[0].parameters()).device
    states: tuple[list[Tensor], list[Tensor]] = [], []
    for batch in images:
        for view in range(views):
            pixels = crops(batch.inputs, batch.indices, view) if view else batch.inputs
            for tower, first, before in zip(towers, first_blocks, states, strict=True):
                with caught({first.module: "in"}) as seen, stopped():
                    architecture.features(tower, pixels.to(device))
                before.append(seen[first.module].cpu())
    if not states[0]:
        raise DataError(f"{weights.label}: there are no images to calibrate on")
    workspace.mkdir(parents=True)
    merged, tuned = (_mapped(workspace / str(number), torch.cat(parts)) for number, parts in enumerate(states))
    return Run(merged, tuned, device, architecture.run_block)


def crops(pixels: Tensor, indices: Sequence[int], view: int) -> Tensor:
    """A part of every picture, enlarged to the picture's size: `SMALLEST` to 1 of its area, from anywhere.

    Args:
        pixels: N x channels x height x width.
        indices: which pictures these are; one has the same crop in every batch.
        view: another number, other crops.
    """
    rows = [np.random.Generator(np.random.Philox(key=view, counter=index)).random(3) for index in indices]
    area, across, down = torch.from_numpy(np.stack(rows)).to(pixels).unbind(1)
    side = (SMALLEST + (1 - SMALLEST) * area).sqrt()
    zero = torch.zeros_like(side)
    corners = [side, zero, (1 - side) * (2 * across - 1), zero, side, (1 - side) * (2 * down - 1)]
    grid = affine_grid(torch.stack(corners, dim=1).view(-1, 2, 3), list(pixels.shape), align_corners=False)
    return grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _mapped(path: Path, values: Tensor) -> Tensor:
    """The same numbers in a file, which the system may put out of memory."""
    stored = torch.from_file(str(path), shared=True, size=values.numel(), dtype=values.dtype).view(values.shape)
    return stored.copy_(values)


class _Stop(Exception):
    """All that was wanted of a forward pass has been seen."""


@contextmanager
def stopped() -> Iterator[None]:
    """A forward pass that `caught` may end."""
    try:
        yield
    except _Stop:
        return


@contextmanager
def caught(wanted: Mapping[nn.Module, str]) -> Iterator[dict[nn.Module, Tensor]]:
    """What goes into (`in`) or comes out of (`out`) some modules in a forward pass, which ends when all is there."""
    seen: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, value: Tensor) -> None:
        seen[module] = value
        if len(seen) == len(wanted):
            raise _Stop

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        keep(module, arguments[0])

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        keep(module, output)

    hooks = [
        module.register_forward_pre_hook(before) if which == "in" else module.register_forward_hook(after)
        for module, which in wanted.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
