"""The pictures of one task on their way through two towers, residual by residual: the merged one and the task's own.

Hidden states are kept in files that are mapped into memory, one set at the beginning of a block and one within it, so
that a block can be begun again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BATCH = 32
"""Images at a time."""


class HiddenStates:
    """Hidden states of one task's images, images x positions x width, in the merged tower and in the task's own.

    Of each tower there are two files: the states at the beginning of a block, and those within it, so that a block that
    was interrupted can be begun again.

    Args:
        folder: for the files; those that are there are gone on with.
        shape: of the states.
        blocks: how many are done.
    """

    def __init__(self, folder: Path, shape: Sequence[int], blocks: int = 0) -> None:
        self.count = shape[0]
        self._files = {tower: [_mapped(_file(folder, tower, side), shape) for side in (0, 1)] for tower in TOWERS}
        self._start = blocks % 2
        self._within: set[str] = set()

    def batches(self) -> Iterator[slice]:
        """Which images are taken together."""
        for start in range(0, self.count, BATCH):
            yield slice(start, min(start + BATCH, self.count))

    def read(self, tower: str, part: slice) -> Tensor:
        """The states of some images, as far as they have got."""
        side = 1 - self._start if tower in self._within else self._start
        return self._files[tower][side][part]

    def write(self, tower: str, part: slice, states: Tensor) -> None:
        """The states of some images one residual further; `passed` when all are there."""
        self._files[tower][1 - self._start][part] = states

    def passed(self, tower: str) -> None:
        """All images of a tower have been written."""
        self._within.add(tower)

    def end_block(self) -> None:
        """What has been written is the beginning of the next block."""
        self._start = 1 - self._start
        self._within.clear()


TOWERS = ("merged", "tuned")


def write_first(folder: Path, batches: Iterable[Mapping[str, Tensor]]) -> list[int] | None:
    """States at the beginning of the first block, batch after batch, so that they are never in memory together.

    Args:
        batches: tower -> images x positions x width.

    Returns:
        The shape of all, None where there is no batch.
    """
    shape: list[int] | None = None
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        streams = {tower: files.enter_context(_file(folder, tower, side=0).open("wb")) for tower in TOWERS}
        for batch in batches:
            for tower, states in batch.items():
                streams[tower].write(states.float().cpu().contiguous().numpy().data)
            count, *rest = batch[TOWERS[0]].shape
            shape = [(shape[0] if shape else 0) + count, *rest]
    return shape


def _file(folder: Path, tower: str, side: int) -> Path:
    return folder / f"{tower}-{side}"


def _mapped(path: Path, shape: Sequence[int]) -> Tensor:
    """Numbers in a file, which the system may put out of memory; those of an earlier run where it is there."""
    return torch.from_file(str(path), shared=True, size=int(np.prod(shape)), dtype=torch.float32).view(*shape)


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
def caught(reader: nn.Module | None = None, outputs: Iterable[nn.Module] = ()) -> Iterator[dict[nn.Module, Tensor]]:
    """What goes into `reader` in a forward pass, which ends there; or what comes out of some modules in a whole one."""
    seen: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen[module] = arguments[0]
        raise _Stop

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        seen[module] = output

    hooks = [module.register_forward_hook(after) for module in outputs]
    if reader is not None:
        hooks.append(reader.register_forward_pre_hook(before))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
