"""Merges of tiny models in memory by the name of a method, and how far they lie from what they should be."""

from __future__ import annotations

from typing import Any

from helpers import reference
from helpers.checkpoints import StateDict, tiny_state
from helpers.statistics import statistics
from hf_epimer import merge_state_dicts

MATRIX = "vision_model.encoder.layers.0.mlp.fc1.weight"


VECTOR = "vision_model.encoder.layers.0.mlp.fc1.bias"


def models(base: StateDict, tasks: int = 3) -> list[StateDict]:
    return [tiny_state(t + 1, base) for t in range(tasks)]


def merged(method: str, base: StateDict, tuned: list[StateDict], **arguments: Any) -> StateDict:
    arguments.setdefault("statistics", statistics(method, len(tuned)))
    return merge_state_dicts(base, tuned, method=method, **arguments)


def distance(a: StateDict, b: StateDict, base: StateDict) -> float:
    """Largest relative difference of two merged task vectors over all parameters."""
    return max(float((a[n] - b[n]).norm() / (a[n] - base[n]).norm().clamp_min(1e-12)) for n in base)


def error(method: str, expected: Any, base: StateDict, tuned: list[StateDict], **arguments: Any) -> float:
    result = merged(method, base, tuned, **arguments)
    return reference.relative_error(result[MATRIX], expected, base[MATRIX])
