"""The Riemannian mean: factors modulo GL(r) under the scale-free quotient metric. The reference for the other means.

    g((dB, dA), (dB, dA)) = tr((A A^T) dB^T dB) + tr((B^T B) dA dA^T)            invariant under (B G, G^{-1} A)
    horizontal: B^T dB A A^T = B^T B dA A^T     lift of xi: dB = (I - P_B/2) xi A^T (A A^T)^{-1},
                                                            dA = (B^T B)^{-1} B^T xi (I - P_A/2)
    logarithm of D_t at B A: (B_t G_t - B, G_t^{-1} A_t - A), horizontal for  G_t P_t G_t = Q_t,
        P_t = (B^T B)^{-1} B^T B_t,  Q_t = A_t A^T (A A^T)^{-1},  K_t = (Q_t P_t)^{-1/2};
        so B_t G_t = B_t K_t Q_t and G_t^{-1} A_t = P_t K_t A_t, also where r_t < r
    descent (Karcher flow): (B, A) <- (B, A) + step sum l_t log_t; grad of 1/2 sum l_t d^2 is -sum l_t log_t

The logarithm inverts the retraction (B + dB)(A + dA), exact to second order; geodesics of this metric have no closed
form. It does not exist where Q_t P_t has eigenvalues on the negative axis or is singular; such adapters pull along the
lift of D_t - B A instead (which is the chordal gradient), and the note says how many. Metric: Mishra, Meyer, Bonnabel
and Sepulchre, Computational Statistics 2014.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_epimer.numerics.lowrank.factors import LowRank, low_rank
from hf_epimer.numerics.lowrank.iteration import MAX_STEPS, TOLERANCE, Reached


def riemannian_iteration(points: Sequence[LowRank], weights: Tensor, start: LowRank) -> Reached:
    """Karcher flow until the gradient vanishes."""
    x = start
    step, steps, before = 1.0, 0, torch.inf
    while True:
        pulls = [_logarithm(x, point) for point in points]
        lifted = sum(pull is None for pull in pulls)
        pairs = [_lift(x, point) if pull is None else pull for pull, point in zip(pulls, points, strict=True)]
        db = torch.einsum("t,tij->ij", weights, torch.stack([pair[0] for pair in pairs]))
        da = torch.einsum("t,tij->ij", weights, torch.stack([pair[1] for pair in pairs]))
        size = float((((db * x.s.sqrt()).square().sum() + (da.mT * x.s.sqrt()).square().sum()) / 2).sqrt() / x.s.norm())
        if size <= TOLERANCE or steps == MAX_STEPS:
            break
        if size > before:
            step = max(0.5 * step, _SHORTEST)
        before = size
        b, a = x.balanced()  # the balanced representative: B^T B = A A^T = diag(s), and nothing is ill-conditioned
        x = low_rank(b + step * db, a + step * da)
        steps += 1
    note = f"{lifted} of {len(points)} have no logarithm there: chordal gradient" if lifted else ""
    return Reached(x, steps, size, unique=not lifted, note=note)


_SHORTEST = 1 / 16


def _logarithm(x: LowRank, point: LowRank) -> tuple[Tensor, Tensor] | None:
    """The horizontal vector at x that retracts to the point, or None where there is none."""
    b, a = x.balanced()
    b_t, a_t = point.balanced()
    p = (b / x.s).mT @ b_t
    q = a_t @ (a.mT / x.s)
    k = _inverse_root(q @ p)
    return None if k is None else (b_t @ k @ q - b, p @ k @ a_t - a)


def _lift(x: LowRank, point: LowRank) -> tuple[Tensor, Tensor]:
    """The horizontal lift of the tangent part of D_t - x: the chordal gradient."""
    across = ((point.u * point.s) @ (point.v.mT @ x.v)) - x.u * x.s  # (D_t - X) V
    down = (x.u.mT @ point.u) @ (point.v * point.s).mT - (x.v * x.s).mT  # U^T (D_t - X)
    inner = 0.5 * (x.u.mT @ across)
    return (across - x.u @ inner) / x.s.sqrt(), (down - inner @ x.v.mT) / x.s.sqrt().unsqueeze(1)


def _inverse_root(matrix: Tensor) -> Tensor | None:
    """M^{-1/2}, the principal one, or None if M has none worth trusting."""
    values, vectors = torch.linalg.eig(matrix)
    sizes = values.abs()
    if bool((sizes <= _SINGULAR * sizes.amax()).any()) or bool((values.angle().abs() > _NEARLY_NEGATIVE).any()):
        return None
    inverse, failed = torch.linalg.inv_ex(vectors)
    if bool(failed):
        return None
    root = ((vectors * values.rsqrt()) @ inverse).real
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for _ in range(2):  # Newton steps take back what ill-conditioned eigenvectors have cost
        root = root @ (1.5 * identity - 0.5 * (matrix @ root @ root))
    good = (root @ matrix @ root - identity).norm() <= _TRUSTED * len(matrix)
    return root if bool(good) else None


_SINGULAR = 1e-10
_NEARLY_NEGATIVE = 3.0
_TRUSTED = 1e-9
