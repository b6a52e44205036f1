"""The Fréchet mean of T points under T metrics, and what the theory says about it.

    F(x) = sum l_t (x - c_t)^T H_t (x - c_t),   x_H = argmin F = (sum l_t H_t)^{-1} sum l_t H_t c_t     (eq 13, Thm 1)
    eta  = F(c_bar) - F(x_H) = c^T H_bar^{-1} c,  c = sum l_t (H_t - H_bar)(c_t - c_bar)                (Theorem 3)

Conjugate gradients start at the flat mean c_bar = sum l_t c_t. Its residual, sum l_t H_t (c_t - c_bar), is Theorem 3's
c, so eta comes with the solve for free: eta = c . (x_H - c_bar).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_epimer.numerics.linalg import conjugate_gradient
from hf_epimer.numerics.metric import ProjectedMetrics


@dataclass(frozen=True)
class FrechetMean:
    """`value` (length p) and how the solve went; `eta` in units of the metrics as given."""

    value: Tensor
    eta: float
    steps: int
    residual: float
    condition: float


def frechet_mean(
    metrics: ProjectedMetrics,
    coordinates: Tensor,
    weights: Tensor,
    *,
    tolerance: float = 1e-4,
    exact: bool = False,
) -> FrechetMean:
    """Minimise F (eq 13).

    Args:
        metrics: T weighted metrics, one operator.
        coordinates: c_t, T x p.
        weights: l_t, length T, summing to 1.
        tolerance: relative error of the iterative solve.
        exact: assemble H_bar and solve densely.

    Returns:
        The mean, eta, and the solver's steps, final relative residual and condition estimate.
    """
    flat = weights @ coordinates
    correlation = metrics.weighted_sum(coordinates - flat)
    if exact:
        matrix = metrics.dense()
        values, vectors = torch.linalg.eigh(matrix)
        # the pseudo-inverse: atoms of one checkpoint given twice are dependent, and H is then singular
        kept = values > torch.finfo(values.dtype).eps * len(values) * values[-1]
        step = vectors[:, kept] @ ((vectors[:, kept].mT @ correlation) / values[kept])
        condition = float(values[kept][-1] / values[kept][0])
        residual = float((matrix @ step - correlation).norm() / correlation.norm().clamp_min(1e-300))
        return FrechetMean(flat + step, float(correlation @ step), 0, residual, condition)
    solution = conjugate_gradient(
        metrics.apply, correlation, flat, precondition=metrics.preconditioner(), tolerance=tolerance
    )
    eta = float(correlation @ (solution.x - flat))
    return FrechetMean(solution.x, eta, solution.steps, solution.residual, solution.condition)
