"""Tensors on their way to where they are computed with, and how many may stay there."""

from __future__ import annotations

import torch
from torch import Tensor

SHARE = 0.5
"""Of a GPU's free memory: so much what only waits to be read may take. Weights, activations and sums need room, too."""


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device. To a GPU they go through memory that it reads by itself, so that nobody waits for them."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def has_room(device: torch.device, nbytes: int) -> bool:
    """Whether so many bytes may stay on a device: on a GPU a share of what is free; never on others, nor on the CPU."""
    return device.type == "cuda" and nbytes <= SHARE * torch.cuda.mem_get_info(device)[0]
