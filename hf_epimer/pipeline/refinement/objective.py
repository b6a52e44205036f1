"""What a refinement minimises over all weights of the merged tower f: distillation without labels.

    L = sum_t l_t d_t / d_t(start),    d_t = mean_i |z_t(f(x_i)) - z_t(f_t(x_i))|^2

x_i are images of task t, whole and cropped, f_t is the tower of its own model, and z_t what the task's head reads: of a
zero-shot head the projected features divided by their norm, of a linear one the features. So d_t is 2 - 2 cos of two
feature vectors, all tasks begin with the same say, and L is 1 at the start.

Distillation: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, on features instead of logits.
Calibration (`hf_epimer.pipeline.calibration.step`) is its layer-wise counterpart in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

SMALLEST = 1e-6
"""Of d_t(start): below it a task's features are its model's already, but for rounding."""


def squared_distances(embedded: Tensor, targets: Tensor) -> Tensor:
    """|z_t(f(x_i)) - z_t(f_t(x_i))|^2 of every image: [n] of two [n, d]."""
    return (embedded.float() - targets.float()).square().sum(-1)


def task_gains(weights: Sequence[float], at_start: Sequence[float]) -> list[float]:
    """l_t / d_t(start) of every task."""
    return [weight / max(distance, SMALLEST) for weight, distance in zip(weights, at_start, strict=True)]
