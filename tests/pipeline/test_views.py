"""Crops: parts of their pictures, the same ones in every batch."""

from __future__ import annotations

import torch

from hf_epimer.pipeline.views import SMALLEST, crops


def test_crops_are_parts_of_their_pictures() -> None:
    """Of a picture whose value is its own coordinate: a crop is a straight ramp, inside, with a side of its own."""
    ramp = (torch.arange(40.0) + 0.5) / 40
    pixels = torch.stack([ramp.expand(40, 40), ramp.unsqueeze(1).expand(40, 40)]).expand(50, 2, 40, 40)
    found = crops(pixels, range(50), 1)
    assert found.shape == pixels.shape
    across, down = found[:, 0], found[:, 1]
    steps = across[:, :, 1:-1].diff(dim=2)  # all but the border, where there is nothing to interpolate with
    assert torch.allclose(steps, steps.mean((1, 2), keepdim=True), atol=1e-4)
    sides = steps.mean((1, 2)) * 40
    assert float(sides.min()) > SMALLEST**0.5 - 0.01 and float(sides.max()) < 1.01 and float(sides.std()) > 0.02
    assert torch.allclose(sides, down[:, 1:-1].diff(dim=1).mean((1, 2)) * 40, atol=1e-3)
    left, top = across[:, 0, 1] - 1.5 * sides / 40, down[:, 1, 0] - 1.5 * sides / 40
    for corner in (left, top):
        assert float(corner.min()) > -0.01 and float((corner + sides).max()) < 1.01
    assert float((left - top).abs().mean()) > 0.01


def test_a_picture_has_the_same_crop_in_every_batch_and_another_one_in_every_view() -> None:
    pixels = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    together = crops(pixels, range(6), 2)
    apart = torch.cat([crops(pixels[:2], range(2), 2), crops(pixels[2:], range(2, 6), 2)])
    assert torch.allclose(together, apart, atol=1e-6)
    assert not torch.allclose(together, crops(pixels, range(6), 3), atol=1e-2)
    assert not torch.allclose(crops(pixels[:1], [0], 1), crops(pixels[:1], [1], 1), atol=1e-2)
