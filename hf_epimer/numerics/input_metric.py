"""The Fréchet mean of a whole layer, every task with a metric on the layer's inputs, anchored at a start.

    minimise over D, m x n:   sum_t l_t tr((D - D_t) M_t (D - D_t)^T) + r |D - D_0|^2
    D = D_0 + (sum_t l_t (D_t - D_0) M_t) (M + r)^{-1},   M = sum_t l_t M_t,   r = rho mean(diag M)

That is EpiMer's eq 13 with H_t = I (x) M_t and with S = I: no basis, every entry of the layer is free. M_t is n x n and
positive semidefinite. With M_t = A_t and rho -> 0 it is RegMean, with M_t ~ D_t^T D_t WUDI from another start; rho ->
infinity gives the start D_0.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def unit_mean(metric: Tensor) -> Tensor:
    """M / mean(diag M); a metric of zeros stays as it is."""
    mean = metric.diagonal().mean()
    return metric / mean if bool(mean > 0) else metric


def unit_along(metric: Tensor, own: Tensor) -> Tensor:
    """M_t scaled so that tr(D_t M_t D_t^T) = |D_t|^2: the curvature is 1 on average along the task's own vector.

    Args:
        metric: M_t, n x n.
        own: D_t^T D_t, n x n, with which that trace is an inner product: <M_t, D_t^T D_t>.

    So every task loses alike by losing its vector. By their traces alone, a metric that sees little but one direction,
    such as that of a two-class task, would overrule all others there.
    """
    along = torch.dot(metric.flatten(), own.flatten())
    return metric * (own.diagonal().sum() / along) if bool(along > 0) else unit_mean(metric)


def anchored_mean(
    task_vectors: Tensor, metrics: Iterable[Tensor], weights: Tensor, start: Tensor, rho: float
) -> Tensor:
    """Solve for D; one symmetric n x n system.

    Args:
        task_vectors: D_t, T x m x n.
        metrics: M_t, n x n each; taken one at a time, so that a generator need not hold all of them.
        weights: l_t, length T.
        start: D_0, m x n.
        rho: > 0, in units of the mean curvature.
    """
    system = start.new_zeros(start.shape[1], start.shape[1])
    right_side = torch.zeros_like(start)
    for weight, task_vector, metric in zip(weights, task_vectors, metrics, strict=True):
        system.add_(metric * weight)
        right_side.addmm_(task_vector - start, metric, alpha=float(weight))
    system.diagonal().add_(rho * system.diagonal().mean())
    return start + torch.cholesky_solve(right_side.mT, torch.linalg.cholesky(system)).mT


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
    own = weights @ task_vectors.flatten(1).square().sum(1)
    return mean * (own / squared).clamp(max=float(len(weights)))
