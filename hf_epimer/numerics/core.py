"""A full core in the tagged basis: every left direction may meet every right one, not only its own.

    minimise over M, p x p:   sum_t w_t tr(S_t (D_t - U M V^T) A_t (D_t - U M V^T)^T) + rho |M - M_0|^2
    sum_t w_t (U^T S_t U) M (V^T A_t V) + rho M = sum_t w_t U^T S_t D_t A_t V + rho M_0

with S_t, A_t the Kronecker factors of task t's curvature and w_t = l_t p^2 / (tr(U^T S_t U) tr(V^T A_t V)), so that all
tasks' curvatures have mean eigenvalue 1 on the core before they are weighted. The right side is exact: what the metric
says of the part of D_t outside the basis is in it. rho -> infinity gives the scaffold M_0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_epimer.numerics.linalg import Solution
from hf_epimer.numerics.subspace import TaggedBasis
from hf_epimer.numerics.sylvester import solve_sylvester


def full_core(
    basis: TaggedBasis,
    task_vectors: Tensor,
    outputs: Sequence[Tensor] | None,
    inputs: Sequence[Tensor],
    weights: Tensor,
    scaffold: Tensor,
    rho: float,
    *,
    tolerance: float = 1e-6,
) -> Solution:
    """Solve for M.

    Args:
        basis: U and V, p columns each.
        task_vectors: D_t, T x m x n.
        outputs: S_t, T x m x m; None for identities.
        inputs: A_t, T x n x n.
        weights: l_t, length T, summing to 1.
        scaffold: M_0, p x p.
        rho: > 0, in units of the mean curvature.
        tolerance: relative error of M.

    Returns:
        The solution with `x` = M, p x p, in float64.
    """
    u, v = basis.u, basis.v
    lefts, rights, sides = [], [], []
    for task, (d, a) in enumerate(zip(task_vectors, inputs, strict=True)):
        curved = outputs[task] @ u if outputs is not None else u
        lefts.append((u.mT @ curved).double())
        across = a @ v
        rights.append((v.mT @ across).double())
        sides.append((curved.mT @ (d @ across)).double())
    left, right = torch.stack(lefts), torch.stack(rights)
    means = left.diagonal(dim1=1, dim2=2).mean(1) * right.diagonal(dim1=1, dim2=2).mean(1)
    gains = weights.double() * torch.where(means > 0, 1 / means, torch.zeros_like(means))
    left = gains[:, None, None] * left
    start = scaffold.double()
    residual = torch.einsum("t,tij->ij", gains, torch.stack(sides)) - (left @ start @ right).sum(0)
    return solve_sylvester(left, right, rho, start, residual, tolerance=tolerance)
