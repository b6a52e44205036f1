"""The Fréchet mean of a whole layer, every task with a metric on the layer's inputs, anchored at a start.

    minimise over D, m x n:   sum_t l_t tr((D - D_t) M_t (D - D_t)^T) + r |D - D_0|^2
    D = (sum_t l_t D_t M_t + r D_0) (M + r)^{-1},   M = sum_t l_t M_t,   r = rho mean(diag M)

That is EpiMer's eq 13 with H_t = I (x) M_t and with S = I: no basis, every entry of the layer is free. M_t is n x n and
positive semidefinite. With M_t = A_t and rho -> 0 it is RegMean, with M_t ~ D_t^T D_t WUDI from another start; rho ->
infinity gives the start D_0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_epimer.numerics.product import add_symmetric, mirror, product


@dataclass(frozen=True)
class InputMetric:
    """M = c (a u(A) + b u(D^T D)) of a task with the task vector D, with u(M) = M / mean(diag M) and u(0) = 0.

    c makes tr(D M D^T) = |D|^2: curvature 1 on average along the task's own vector, so that every task loses alike by
    losing its vector. By their traces alone, a metric that sees little but one direction, such as that of a two-class
    task, would overrule all others there.

    Attributes:
        curvature: A, n x n, positive semidefinite; None for zeros.
        heard: a >= 0, the weight of A.
        mixture: b >= 0, the weight of D^T D.
    """

    curvature: Tensor | None = None
    heard: float = 1.0
    mixture: float = 1.0


def anchored_mean(
    task_vectors: Tensor, metrics: Sequence[InputMetric], weights: Tensor, start: Tensor, rho: float
) -> Tensor:
    """Solve for D; one symmetric n x n system.

    Args:
        task_vectors: D_t, T x m x n.
        metrics: M_t.
        weights: l_t, length T.
        start: D_0, m x n.
        rho: > 0, in units of the mean curvature.
    """
    system = start.new_zeros(start.shape[1], start.shape[1])
    right_side = torch.zeros_like(start)
    for weight, task_vector, metric in zip(weights.tolist(), task_vectors, metrics, strict=True):
        _add(system, right_side, weight, task_vector, metric)
    mirror(system)
    pull = rho * system.diagonal().mean()
    system.diagonal().add_(pull)
    right_side.add_(start * pull)
    factor = system.mT  # columns first, as LAPACK has it: factored where it stands, without a copy
    torch.linalg.cholesky(factor, out=factor)
    return torch.cholesky_solve(right_side.mT, factor).mT


def _add(system: Tensor, right_side: Tensor, weight: float, d: Tensor, metric: InputMetric) -> None:
    """Add l_t M_t to the upper half of the system and l_t D_t M_t to its right side.

    D^T D is n x n, and D D^T as good where m < n: their norms are equal, and D (D^T D) = (D D^T) D.
    """
    wide = d.shape[0] < d.shape[1]
    gram = product(d, d.mT) if wide else product(d.mT, d)
    squared = float(gram.diagonal().sum())
    b = metric.mixture * d.shape[1] / squared if squared > 0 else 0.0
    along = b * float(gram.square().sum())
    curvature, a = metric.curvature, 0.0
    if curvature is not None and (mean := float(curvature.diagonal().mean())) > 0:
        a = metric.heard / mean
        image = product(d, curvature)
        along += a * float(torch.dot(image.flatten(), d.flatten()))
    c = weight * (squared / along if along > 0 else 1.0)
    if curvature is not None and a > 0:
        system.add_(curvature, alpha=c * a)
        right_side.add_(image, alpha=c * a)
    if b > 0:
        right_side.add_(product(gram, d) if wide else product(d, gram), alpha=c * b)
        if wide:
            add_symmetric(system, d.mT, d, c * b)
        else:
            system.add_(gram, alpha=c * b)


def agreed_sum(task_vectors: Tensor, weights: Tensor) -> Tensor:
    """The multiple of the mean that goes, on average, as far along the task vectors as they go themselves.

        D_0 = c sum_t l_t D_t   with   sum_t l_t <D_0, D_t> = sum_t l_t |D_t|^2,   1 <= c <= T

    Task vectors at right angles and of equal weight give their sum, T equal ones that one vector again. Opposite ones
    would ask for any length: the sum is the limit.
    """
    mean = torch.tensordot(weights, task_vectors, dims=1)
    squared = mean.square().sum()
    if not bool(squared > 0):
        return mean
    own = weights @ torch.linalg.vector_norm(task_vectors.flatten(1), dim=1).square()
    return mean * (own / squared).clamp(max=float(len(weights)))
