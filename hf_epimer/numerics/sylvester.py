"""Sums of two-sided products: the linear systems of Kronecker curvature, solved for a matrix.

    sum_t S_t M A_t + rho M = B,    S_t p x p and A_t q x q, symmetric and positive semidefinite,  M and B p x q

This is what is left of F(M) = sum_t tr(S_t (M - M_t) A_t (M - M_t)^T) + rho |M - M_0|^2 where it is smallest. Solved by
conjugate gradients, preconditioned by the Kronecker product nearest in traces, S_bar (x) A_bar + rho, through two
eigendecompositions. For a single task that is the inverse itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_epimer.numerics.linalg import Solution, conjugate_gradient


def solve_sylvester(
    outputs: Tensor,
    inputs: Tensor,
    rho: float,
    start: Tensor,
    residual: Tensor,
    *,
    tolerance: float = 1e-8,
    max_steps: int = 500,
) -> Solution:
    """Solve for M, beginning at a matrix whose residual is known.

    Args:
        outputs: S_t, T x p x p, any weights multiplied in.
        inputs: A_t, T x q x q.
        rho: >= 0.
        start: where to begin, p x q.
        residual: B - sum_t S_t start A_t - rho start, p x q.
        tolerance: relative error of M.

    Returns:
        The solution with `x` p x q.
    """

    def apply(x: Tensor) -> Tensor:
        matrix = x.view(start.shape)
        total = rho * matrix
        for left, right in zip(outputs, inputs, strict=True):
            total = total + left @ matrix @ right
        return total.flatten()

    found = conjugate_gradient(
        apply,
        residual.flatten(),
        start.flatten(),
        precondition=_kronecker_inverse(outputs, inputs, rho),
        tolerance=tolerance,
        max_steps=max_steps,
    )
    return Solution(found.x.view(start.shape), found.steps, found.residual, found.condition)


def _kronecker_inverse(outputs: Tensor, inputs: Tensor, rho: float) -> Callable[[Tensor], Tensor]:
    """(S_bar (x) A_bar + rho)^{-1}, with eigenvalues that are rounding lifted: S_t and A_t may have directions of 0."""
    left_means = outputs.diagonal(dim1=1, dim2=2).mean(1)
    right_means = inputs.diagonal(dim1=1, dim2=2).mean(1)
    scale = float(left_means @ right_means)
    rows, p = torch.linalg.eigh(torch.einsum("t,tij->ij", right_means, outputs))
    columns, q = torch.linalg.eigh(torch.einsum("t,tij->ij", left_means, inputs))
    spectrum = rows.clamp_min(0).unsqueeze(1) * columns.clamp_min(0) / (scale or 1.0) + rho
    spectrum = spectrum.clamp_min(1e-12 * float(spectrum.max()))

    def solve(r: Tensor) -> Tensor:
        turned = p.mT @ r.view(spectrum.shape) @ q
        return (p @ (turned / spectrum) @ q.mT).flatten()

    return solve
