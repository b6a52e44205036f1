"""The types that every room shares, one definition each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Shape = tuple[int, ...]

Progress = Callable[[str, int, int], None]
"""(what is going on, units done since the last call, units in all); 0 done announces a stage."""

Precision = Literal["no", "bf16"]
"""Mixed precision of a model's passes, in accelerate's words: float32, or products of bfloat16 summed in float32."""
