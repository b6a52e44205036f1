"""Regression of one linear layer on samples, anchored where it is.

    minimise over E, m x n:   sum_i |y_i - (W + E) x_i|^2 + rho |E|^2
    E (G + rho I) = C,        G = sum_i x_i x_i^T,   C = sum_i (y_i - W x_i) x_i^T = Y X^T - W G

One Cholesky factor of an n x n matrix, whatever m. G and C of several tasks are added, each brought to one scale; with
inputs of the fine-tuned models themselves that is RegMean with a ridge at W.

A task vector D = W_t - W_0 is what training summed up of (output gradient) (input)^T, so D^T D is a second sum over
inputs: those that moved the layer, over the whole training and not over a few hundred samples. `prior` adds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_epimer.numerics.product import add_symmetric, mirror, product


def anchored_step(gram: Tensor, cross: Tensor, rho: float) -> Tensor:
    """Solve E (G + rho I) = C.

    Args:
        gram: G, n x n, symmetric and positive semidefinite.
        cross: C, m x n.
        rho: > 0, in units of G.

    Returns:
        E, m x n.
    """
    ridge = gram + rho * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(cross.mT, torch.linalg.cholesky(ridge)).mT


def prior(task_vector: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """What a task vector adds to G and C, of mean diagonal 1: N = D^T D / mean(diag D^T D) and (W_t - W) N.

    (W_t - W) N is multiplied from the side that takes fewer operations.

    Args:
        task_vector: D = W_t - W_0, m x n.
        gap: W_t - W, m x n.

    Returns:
        n x n and m x n; zero where D is.
    """
    outputs, inputs = task_vector.shape
    mean = task_vector.square().sum() / inputs
    scale = torch.where(mean > 0, 1 / mean, 0.0)
    known = scale * gram(task_vector, task_vector)
    if inputs <= 2 * outputs:
        return known, product(gap, known)
    return known, scale * product(product(gap, task_vector.mT), task_vector)


def gram(x: Tensor, weighted: Tensor) -> Tensor:
    """sum_i w_i x_i x_i^T.

    Args:
        x: N x n.
        weighted: w_i x_i, N x n.

    Returns:
        n x n, symmetric.
    """
    total = x.new_zeros(x.shape[1], x.shape[1])
    add_symmetric(total, weighted.mT, x)
    return mirror(total)
