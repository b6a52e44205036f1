"""The pictures of one task on their way through two towers, residual by residual: the merged one and the task's own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_epimer.checkpoints.atomic import write_text

BATCH = 32
"""Images at a time."""

TOWERS = ("merged", "tuned")


class HiddenStates:
    """Hidden states of one task's images, images x positions x width, in the merged tower and in the task's own.

    Args:
        sides: tower -> the states at the beginning of a block, and where those within it are written. They are two
            tensors where a block may have to be begun again, by a later process; else one.
        blocks: how many have been passed; after an odd number the sides have changed places.
    """

    def __init__(self, sides: Mapping[str, tuple[Tensor, Tensor]], blocks: int = 0) -> None:
        self.count = len(sides[TOWERS[0]][0])
        self.blocks = blocks
        self._sides = sides
        self._within: set[str] = set()

    def batches(self) -> Iterator[slice]:
        """Which images are taken together."""
        for start in range(0, self.count, BATCH):
            yield slice(start, min(start + BATCH, self.count))

    def read(self, tower: str, part: slice) -> Tensor:
        """The states of some images, as far as they have got."""
        return self._sides[tower][(self.blocks + (tower in self._within)) % 2][part]

    def write(self, tower: str, part: slice, states: Tensor) -> None:
        """The states of some images one residual further, after they have been read; `passed` when all are there."""
        self._sides[tower][(self.blocks + 1) % 2][part] = states

    def passed(self, tower: str) -> None:
        """All images of a tower have been written."""
        self._within.add(tower)

    def end_block(self) -> None:
        """What has been written is the beginning of the next block."""
        self.blocks += 1
        self._within.clear()


Beginnings = Iterable[Mapping[str, Tensor]]
"""Batch after batch, tower -> images x positions x width at the beginning of the first block."""


def states_in_memory(batches: Beginnings) -> HiddenStates | None:
    """States where the batches are; they end with the process. None where there is no batch."""
    kept = list(batches)
    if not kept:
        return None
    whole = {tower: torch.cat([batch[tower] for batch in kept]).float() for tower in TOWERS}
    return HiddenStates({tower: (states, states) for tower, states in whole.items()})


def states_in_files(folder: Path, batches: Beginnings, blocks: int) -> HiddenStates | None:
    """States in files that are mapped into memory, so that the system may put them out of it.

    Args:
        folder: where a process that was interrupted has left them, none of `batches` is taken.
        blocks: that it had passed.
    """
    note = folder / "shape.json"
    if not note.exists():
        shape = _write(folder, batches)
        if shape is None:
            return None
        write_text(note, json.dumps(shape))
    shape = json.loads(note.read_text(encoding="utf-8"))
    mapped = {tower: (_mapped(folder, tower, 0, shape), _mapped(folder, tower, 1, shape)) for tower in TOWERS}
    return HiddenStates(mapped, blocks)


def _write(folder: Path, batches: Beginnings) -> list[int] | None:
    """Write one side, batch after batch, so that they are never in memory together; the shape of all."""
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


def _mapped(folder: Path, tower: str, side: int, shape: Sequence[int]) -> Tensor:
    numbers = torch.from_file(str(_file(folder, tower, side)), shared=True, size=prod(shape), dtype=torch.float32)
    return numbers.view(*shape)


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
