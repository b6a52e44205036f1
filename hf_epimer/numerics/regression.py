"""Regression of one linear layer on several tasks at once, each with a curvature of its outputs, anchored at a start.

    minimise over E, m x n:   sum_t g_t sum_i (y_i - (W + E) x_i)^T S_t (y_i - (W + E) x_i) + rho |E|^2
    sum_t g_t S_t E G_t + rho E = sum_t g_t S_t C_t,    G_t = sum_i x_i x_i^T,   C_t = sum_i (y_i - W x_i) x_i^T

over the samples i of task t. g_t = l_t / mean(diag G_t) brings inputs to one scale; S_t is divided by its mean
eigenvalue and mixed with the identity, since a few hundred samples do not fill it. With S_t = I and inputs of the
fine-tuned models themselves it is RegMean with a ridge at W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_epimer.numerics.linalg import Solution
from hf_epimer.numerics.sylvester import solve_sylvester


def anchored_step(
    grams: Tensor,
    crosses: Tensor,
    outputs: Tensor,
    weights: Tensor,
    *,
    rho: float,
    share: float,
    tolerance: float = 1e-3,
) -> Solution:
    """Solve for the step E.

    Args:
        grams: G_t, T x n x n.
        crosses: C_t, T x m x n.
        outputs: S_t, T x m x m, symmetric and positive semidefinite.
        weights: l_t, length T, summing to 1.
        rho: > 0, in units of the mean squared input.
        share: of S_t in its mixture with the identity, in [0, 1].
        tolerance: relative error of E.

    Returns:
        The solution with `x` = E; zero where no task has any input.
    """
    means = grams.diagonal(dim1=1, dim2=2).mean(1)
    gains = weights * torch.where(means > 0, 1 / means, torch.zeros_like(means))
    scales = outputs.diagonal(dim1=1, dim2=2).mean(1)
    shares = torch.where(scales > 0, share / scales, torch.zeros_like(scales))
    rest = torch.where(scales > 0, 1.0 - share, 1.0)  # a task without curvature counts as a flat one
    identity = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
    metrics = shares[:, None, None] * outputs + rest[:, None, None] * identity
    metrics = gains[:, None, None] * metrics
    right_side = (metrics @ crosses).sum(0)
    return solve_sylvester(metrics, grams, rho, torch.zeros_like(right_side), right_side, tolerance=tolerance)
