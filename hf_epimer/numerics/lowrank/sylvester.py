"""The mean of cores under Kronecker curvature: one generalised Sylvester equation.

    F(M) = sum l_t tr(S_t (M - M_t) A_t (M - M_t)^T),  S_t p x p of outputs, A_t q x q of inputs, in core coordinates
    sum l_t S_t M A_t + rho M = sum l_t S_t M_t A_t + rho M_bar,  M_bar = sum l_t M_t

Solved by conjugate gradients from M_bar, preconditioned by the Kronecker product nearest in traces, S_bar (x) A_bar +
rho, through two eigendecompositions. With curvature of the dense layer, S_t = U_ref^T S U_ref and A_t = V_ref^T A
V_ref, and D_t lies in the core, so the right side is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_epimer.numerics.linalg import conjugate_gradient


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

    def apply(x: Tensor) -> Tensor:
        matrix = x.view(flat.shape)
        return ((weighted @ matrix @ inputs).sum(0) + damping * matrix).flatten()

    left = torch.einsum("t,tij->ij", gains * sides[1], outputs)
    right = torch.einsum("t,tij->ij", gains * sides[0], inputs)
    start = (weighted @ (cores - flat) @ inputs).sum(0).flatten()
    solution = conjugate_gradient(
        apply,
        start,
        flat.flatten(),
        precondition=_kronecker_inverse(left, right, damping),
        tolerance=tolerance,
        max_steps=500,
    )
    eta = float(start @ (solution.x - flat.flatten()) * scale)
    return CoreMean(solution.x.view(flat.shape), eta, solution.steps, solution.residual, solution.condition)


def _kronecker_inverse(left: Tensor, right: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    """(left (x) right + rho)^{-1}, with eigenvalues that are rounding lifted: padded cores have directions of zeros."""
    rows, p = torch.linalg.eigh(left)
    columns, q = torch.linalg.eigh(right)
    spectrum = rows.clamp_min(0).unsqueeze(1) * columns.clamp_min(0) + damping
    spectrum = spectrum.clamp_min(1e-12 * float(spectrum.max()))

    def solve(r: Tensor) -> Tensor:
        turned = p.mT @ r.view(spectrum.shape) @ q
        return (p @ (turned / spectrum) @ q.mT).flatten()

    return solve
