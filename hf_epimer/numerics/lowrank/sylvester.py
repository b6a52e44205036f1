"""The mean of cores under Kronecker curvature: one generalised Sylvester equation.

    F(M) = sum l_t tr(S_t (M - M_t) A_t (M - M_t)^T),  S_t p x p of outputs, A_t q x q of inputs, in core coordinates
    sum l_t S_t M A_t + rho M = sum l_t S_t M_t A_t + rho M_bar,  M_bar = sum l_t M_t

Solved from M_bar. With curvature of the dense layer, S_t = U_ref^T S U_ref and A_t = V_ref^T A V_ref, and D_t lies in
the core, so the right side is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_epimer.numerics.sylvester import solve_sylvester


@dataclass(frozen=True)
class CoreMean:
    """`value` p x q and how the solve went; `eta` = F(M_bar) - F(value), in units of the curvature."""

    value: Tensor
    eta: float
    steps: int
    residual: float
    condition: float


def kronecker_mean(
    cores: Tensor,
    outputs: Tensor,
    inputs: Tensor,
    weights: Tensor,
    *,
    damping: float = 1e-6,
    normalize: Literal["none", "trace"] = "none",
    tolerance: float = 1e-8,
) -> CoreMean:
    """Minimise F.

    Args:
        cores: M_t, T x p x q.
        outputs: S_t, T x p x p, symmetric and positive semidefinite.
        inputs: A_t, T x q x q, likewise.
        weights: l_t, length T, summing to 1.
        damping: rho, relative to the mean eigenvalue of sum l_t S_t (x) A_t.
        normalize: `trace` divides every task's curvature by its trace first.
        tolerance: relative error of the solve.
    """
    flat = torch.einsum("t,tij->ij", weights, cores)
    sides = outputs.diagonal(dim1=1, dim2=2).mean(1), inputs.diagonal(dim1=1, dim2=2).mean(1)
    means = sides[0] * sides[1]
    gains = weights * torch.where(means > 0, 1 / means, 0) if normalize == "trace" else weights
    scale = (gains * means).sum()
    if not float(scale) > 0:
        return CoreMean(flat, 0.0, 0, 0.0, 1.0)
    gains = gains / scale
    weighted = gains[:, None, None] * outputs
    residual = (weighted @ (cores - flat) @ inputs).sum(0)
    found = solve_sylvester(weighted, inputs, damping, flat, residual, tolerance=tolerance)
    eta = float((residual * (found.x - flat)).sum() * scale)
    return CoreMean(found.x, eta, found.steps, found.residual, found.condition)
