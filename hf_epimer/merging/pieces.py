"""Parameters in pieces, for methods that look at entries alone: what they work on stays in the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_epimer.types import Shape

PIECE = 1 << 17
"""Entries of a piece: of nine models they take 5 MB; fewer cost more calls than they save in memory's time."""


@dataclass(frozen=True)
class Piece:
    """Every `step`-th entry from `start` to before `stop` of a parameter of `shape`, in the order of its memory."""

    name: str
    shape: Shape
    start: int
    stop: int
    step: int = 1

    @property
    def entries(self) -> int:
        """How many there are."""
        return len(range(self.start, self.stop, self.step))

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the parameter."""
        return self.entries == math.prod(self.shape)

    @property
    def slice(self) -> slice:
        """Of the parameter's flat memory."""
        return slice(self.start, self.stop, self.step)


Pieces = Sequence[Piece]
"""Pieces of one parameter, in order."""


def in_pieces(shapes: Mapping[str, Shape], entries: int | None, step: int = 1) -> list[Pieces]:
    """Every parameter in pieces of so many entries, or of one in `step` of them; None leaves it whole."""
    return [_pieces(name, shape, math.prod(shape), entries, step) for name, shape in shapes.items()]


def _pieces(name: str, shape: Shape, size: int, entries: int | None, step: int) -> Pieces:
    length = max(1, entries or size)
    return [Piece(name, shape, start, min(start + length, size), step) for start in range(0, max(1, size), length)]
