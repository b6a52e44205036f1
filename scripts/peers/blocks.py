"""What closed forms that go through a tower block by block have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from hf_epimer.models.clip import CLIP
from hf_epimer.models.weights import Block
from hf_epimer.pipeline.calibration.states import caught, stopped

States = list[Tensor]
"""Hidden states of a task's pictures, in batches [n, positions, w]."""


def first_states(tower: nn.Module, first: Block, pictures: Sequence[Tensor]) -> States:
    """What goes into the first block, of pixels in batches [n, 3, h, w]."""
    states = []
    device = next(tower.parameters()).device
    for pixels in pictures:
        with caught(first.module) as seen, stopped():
            CLIP.features(tower, pixels.to(device))
        states.append(seen[first.module])
    return states


def passed(block: Block, states: Tensor) -> Tensor:
    """One batch, through a block."""
    for residual in block.residuals(CLIP):
        states = residual.run(block.module, states)
    return states


@contextmanager
def watched(block: Block) -> Iterator[dict[str, Tensor]]:
    """What every layer of a block reads in a pass, [n, positions, width]."""
    seen: dict[str, Tensor] = {}

    def note(name: str, reads: tuple[Tensor, ...]) -> None:
        seen[name] = reads[0]

    hooks = [
        module.register_forward_pre_hook(lambda _, reads, name=name: note(name, reads))
        for name, module in block.layers.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
