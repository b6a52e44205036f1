"""The polar mean: column space, scale and row space apart, (St(m, r) x SPD(r) x St(n, r)) / O(r).

    D_t = U_t S_t V_t^T ~ (U_t O, O^T S_t O, V_t O);   O_t = polar(U_t^T U + V_t^T V)
    U <- polar(sum l_t U_t O_t),  V <- polar(sum l_t V_t O_t)  until they stand still
    R = mean of O_t^T S_t O_t in SPD(r): affine-invariant (`polar`) or log-Euclidean (`log-polar`);   D = U R V^T

Bonnabel and Sepulchre, SIAM J. Matrix Anal. 2010; Meyer, Bonnabel and Sepulchre, ICML 2011. Unlike the chordal mean it
does not shrink scales when subspaces turn. Adapters of lower rank vote on the directions that they have (O_t is then
r_t x r with orthonormal rows); their scales are singular, infinitely far from SPD(r), so scales are then averaged
arithmetically, and the note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_epimer.numerics.lowrank.factors import LowRank, aligning, low_rank, padded
from hf_epimer.numerics.lowrank.iteration import MAX_STEPS, TOLERANCE, Reached


def polar_iteration(
    points: Sequence[LowRank], weights: Tensor, start: LowRank, *, log_euclidean: bool = False
) -> Reached:
    """Alternate rotations and subspaces until U and V stand still, then average the scales (or their logarithms)."""
    u_t, v_t = padded([x.u for x in points]), padded([x.v for x in points])
    u, v = start.u, start.v
    steps, change = 0, torch.inf
    while steps < MAX_STEPS and change > TOLERANCE:
        turns = aligning(u_t.mT @ u + v_t.mT @ v)
        before = u, v
        u = aligning(torch.einsum("t,tij->ij", weights, u_t @ turns))
        v = aligning(torch.einsum("t,tij->ij", weights, v_t @ turns))
        change = float(torch.hypot((u - before[0]).norm(), (v - before[1]).norm())) / max(u.shape[1], 1) ** 0.5
        steps += 1
    turns = aligning(u_t.mT @ u + v_t.mT @ v)
    s_t = padded([x.s.unsqueeze(0) for x in points]).squeeze(1)
    scales = turns.mT @ (s_t.unsqueeze(2) * turns)
    singular = any(point.rank < u.shape[1] for point in points)
    mean = _arithmetic if singular else log_euclidean_mean if log_euclidean else affine_invariant_mean
    note = "unlike ranks: scales averaged arithmetically" if singular else ""
    return Reached(low_rank(u @ mean(scales, weights), v.mT), steps, change, note=note)


def log_polar_iteration(points: Sequence[LowRank], weights: Tensor, start: LowRank) -> Reached:
    """The same with the log-Euclidean mean of the scales."""
    return polar_iteration(points, weights, start, log_euclidean=True)


def log_euclidean_mean(matrices: Tensor, weights: Tensor) -> Tensor:
    """exp(sum l_t log R_t) for R_t symmetric positive definite, T x r x r."""
    return _through_eigenvalues(_arithmetic(_through_eigenvalues(matrices, torch.log), weights), torch.exp)


def affine_invariant_mean(
    matrices: Tensor, weights: Tensor, *, tolerance: float = 1e-13, max_steps: int = 200
) -> Tensor:
    """The Karcher mean of SPD(r): sum l_t log(X^{-1/2} R_t X^{-1/2}) = 0, by fixed-point steps from the log mean."""
    x = log_euclidean_mean(matrices, weights)
    step = 1.0
    before = torch.inf
    for _ in range(max_steps):
        root = _through_eigenvalues(x, torch.sqrt)
        inverse = _through_eigenvalues(x, torch.rsqrt)
        inner = inverse @ matrices @ inverse
        logs = _arithmetic(_through_eigenvalues(0.5 * (inner + inner.mT), torch.log), weights)
        size = float(logs.norm())
        if size <= tolerance * x.shape[0]:
            break
        if size > before:  # points far apart: a full step overshoots
            step *= 0.5
        before = size
        x = root @ _through_eigenvalues(step * logs, torch.exp) @ root
        x = 0.5 * (x + x.mT)
    return x


def _arithmetic(matrices: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("t,tij->ij", weights, matrices)


def _through_eigenvalues(matrices: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    values, vectors = torch.linalg.eigh(matrices)
    if function is not torch.exp:  # rounding may push an eigenvalue of a positive matrix to zero or below
        values = values.clamp_min(torch.finfo(values.dtype).eps * float(values.amax()))
    return (vectors * function(values).unsqueeze(-2)) @ vectors.mT
