"""Views of a picture: the whole, and random crops. No label is used, so whatever a crop shows, each task's own tower
says what is to become of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

SMALLEST = 0.6
"""Of a picture's area: the smallest crop."""


def crops(pixels: Tensor, indices: Sequence[int], view: int) -> Tensor:
    """A part of every picture, enlarged to the picture's size: `SMALLEST` to 1 of its area, from anywhere.

    Args:
        pixels: N x channels x height x width.
        indices: which pictures these are; one has the same crop in every batch.
        view: another number, other crops; 0 for the whole pictures.
    """
    if not view:
        return pixels
    rows = [np.random.Generator(np.random.Philox(key=view, counter=index)).random(3) for index in indices]
    area, across, down = torch.from_numpy(np.stack(rows)).to(pixels).unbind(1)
    side = (SMALLEST + (1 - SMALLEST) * area).sqrt()
    zero = torch.zeros_like(side)
    corners = [side, zero, (1 - side) * (2 * across - 1), zero, side, (1 - side) * (2 * down - 1)]
    grid = affine_grid(torch.stack(corners, dim=1).view(-1, 2, 3), list(pixels.shape), align_corners=False)
    return grid_sample(pixels, grid, padding_mode="border", align_corners=False)
