"""From what a data set stores of a picture to the picture: in RGB, upright, its grey levels between 0 and 255."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


def decode(value: Any) -> Image.Image:
    """An undecoded image value of `datasets` as an RGB picture, turned as its EXIF data say."""
    from datasets import Image as ImageFeature
    from PIL import Image

    if isinstance(value, Image.Image):
        return as_rgb(value)
    if value is None:
        raise ValueError("there is no image")
    return as_rgb(ImageFeature().decode_example(value))


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode in RGB. Grey levels of 16 bits, or between 0 and 1, are scaled; PIL alone would clip them.

    Raises:
        ValueError: its levels are on no scale that is known.
    """
    image.load()
    if image.mode == "RGB":
        return image
    return (_in_eight_bits(image) if image.mode == "F" or image.mode.startswith("I") else image).convert("RGB")


def _in_eight_bits(image: Image.Image) -> Image.Image:
    from PIL import Image

    levels = np.asarray(image, dtype=np.float64)
    low, high = float(levels.min()), float(levels.max())
    scales = (1, 255) if image.mode == "F" else (255, 65535)
    top = next((top for top in scales if low >= 0 and high <= top), None)  # NaN is on none
    if top is None:
        raise ValueError(f"its grey levels, {low:g} to {high:g}, are neither from 0 to {scales[0]} nor to {scales[1]}")
    return Image.fromarray((levels * (255 / top)).round().astype(np.uint8))
