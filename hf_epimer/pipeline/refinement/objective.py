"""What a refinement minimises over all weights of the merged tower f: distillation without labels.

    L = sum_t l_t d_t,    d_t = mean_i |z_t(f(x_i)) - z_t(f_t(x_i))|^2

x_i are images of task t, whole and cropped, f_t is the tower of its own model, and z_t what the task's head reads: of a
zero-shot head the projected features divided by their norm, of a linear one the features. So d_t is 2 - 2 cos of two
feature vectors, and the task that is furthest from its model has the most say: divided by its d_t at the start it
would be given up for those that are nearly there.

Distillation: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, on features (Romero et al.,
"FitNets", 2015) instead of logits. Calibration (`hf_epimer.pipeline.calibration.step`) is its layer-wise counterpart in
closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from torch import Tensor


def squared_distances(embedded: Tensor, targets: Tensor) -> Tensor:
    """|z_t(f(x_i)) - z_t(f_t(x_i))|^2 of every image: [n] of two [n, d]."""
    return (embedded.float() - targets.float()).square().sum(-1)


def loss(weights: Sequence[float], distances: Sequence[float]) -> float:
    """L of l_t and d_t."""
    return fsum(weight * distance for weight, distance in zip(weights, distances, strict=True))
