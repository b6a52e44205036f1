"""Projected metrics of T tasks. `ProjectedMetrics` is all that the Fréchet mean knows of them, whatever their kind.

Diagonal curvature, H_t = S^T diag(v_t) S (EpiMer eq 12), stays an operator; no p x p matrix unless asked for:

    H_bar x         = S^T (v_bar o (S x)),                  v_bar = sum l_t v_t: one operator for all tasks
    sum l_t H_t c_t = S^T (sum l_t v_t o (S c_t)):          one projection for all tasks
    tr H_t          = <v_t, (U o U) (V o V)^T>

Kronecker factors give H_t = (U^T S_t U) o (V^T A_t V), and the projected Fisher is taken as measured; both are dense.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from hf_epimer.numerics.product import product
from hf_epimer.numerics.subspace import TaggedBasis

Normalization = Literal["none", "trace"]


class ProjectedMetrics(Protocol):
    """Weighted metrics of T tasks on one subspace of dimension p; the weights are part of them."""

    scale: float
    """What all metrics were divided by; eta in the units of the curvature is eta times this."""

    flat: bool
    """Whether there is no curvature at all; then every point is a minimum and the plain mean is taken."""

    @property
    def tasks(self) -> int:
        """T."""

    def trace(self, task: int) -> float:
        """tr(l_t H_t)."""

    def apply(self, x: Tensor) -> Tensor:
        """(sum l_t H_t) x, length p."""

    def weighted_sum(self, coordinates: Tensor) -> Tensor:
        """sum l_t H_t c_t for coordinates T x p, length p."""

    def dense(self, task: int | None = None) -> Tensor:
        """l_t H_t of one task, or the sum of all for None, p x p."""

    def preconditioner(self) -> Callable[[Tensor], Tensor]:
        """An approximate inverse of sum l_t H_t."""


class DiagonalMetrics:
    """Metrics from T Fisher diagonals, damped and normalised.

    H_t = g_t S^T diag(v_t + rho mean(v_t)) S with g_t = 1 (`none`, the paper's formula) or p / tr (`trace`: every task
    has the same say whatever the scale of its loss). All metrics are divided by one common number, so that Fisher
    values of 1e-12 do not become denormal; the Fréchet mean does not notice, and `scale` gives the units back.

    Args:
        basis: the tagged basis.
        curvature: T x m x n, v_t >= 0.
        weights: l_t, length T.
        damping: rho >= 0; rho -> infinity is the flat metric, and with it TSV-M's aggregation.
        normalize: `none` or `trace`.
    """

    def __init__(
        self,
        basis: TaggedBasis,
        curvature: Tensor,
        weights: Tensor,
        *,
        damping: float = 1e-6,
        normalize: Normalization = "none",
    ) -> None:
        self.basis = basis
        self.curvature = curvature
        means = curvature.mean(dim=(1, 2))
        gains = weights.clone()
        if normalize == "trace":
            gains *= _inverse(self.traces + damping * means * basis.size)
        scale = (gains * means).sum()
        self.scale = float(scale)
        self.flat = not self.scale > 0  # no curvature anywhere in this layer: the metric is Euclidean
        self.gains = gains / scale if not self.flat else torch.zeros_like(gains)
        self.shifts = self.gains * damping * means if not self.flat else weights.clone()
        self.mean_curvature = (self.gains @ curvature.flatten(1)).view(curvature.shape[1:]) + self.shifts.sum()

    @property
    def tasks(self) -> int:
        return int(self.curvature.shape[0])

    def trace(self, task: int) -> float:
        return float(self.gains[task] * self.traces[task] + self.shifts[task] * self.basis.size)

    @cached_property
    def traces(self) -> Tensor:
        """tr S^T diag(v_t) S, length T."""
        return diagonal_traces(self.basis, self.curvature)

    def apply(self, x: Tensor) -> Tensor:
        return self.basis.project_fast(self.basis.expand_fast(x).mul_(self.mean_curvature))

    def weighted_sum(self, coordinates: Tensor) -> Tensor:
        total = self.basis.expand_fast(self.shifts @ coordinates)
        for gain, v, c in zip(self.gains, self.curvature, coordinates, strict=True):
            total.addcmul_(v, self.basis.expand_fast(c), value=float(gain))
        return self.basis.project_fast(total)

    def dense(self, task: int | None = None) -> Tensor:
        u, v = self.basis.u, self.basis.v
        own = self.gains[task] * self.curvature[task] + self.shifts[task] if task is not None else None
        diagonal = self.mean_curvature if own is None else own
        rows = [((diagonal @ (v * v[:, i : i + 1])) * (u * u[:, i : i + 1])).sum(0) for i in range(self.basis.size)]
        return torch.stack(rows)

    def preconditioner(self) -> Callable[[Tensor], Tensor]:
        """Exact inverse for a rank-one v_bar = r c^T: H = (U^T diag(r) U) o (V^T diag(c) V), by Cholesky."""
        rows = self.mean_curvature.mean(1)
        columns = self.mean_curvature.mean(0) / rows.mean()
        u, v = self.basis.u, self.basis.v
        return _cholesky_solver((u.mT @ (u * rows[:, None])) * (v.mT @ (v * columns[:, None])))


def diagonal_traces(basis: TaggedBasis, curvature: Tensor) -> Tensor:
    """tr S^T diag(v_t) S = <v_t, (U o U) (V o V)^T>, length T, from v_t, T x m x n."""
    energy = product(basis.u.square(), basis.v.square().mT)
    return curvature.flatten(1) @ energy.flatten()


class DenseMetrics:
    """Metrics that are p x p matrices, damped and normalised as in `DiagonalMetrics`.

    Args:
        metrics: H_t, T x p x p, symmetric and positive semidefinite.
        weights: l_t, length T.
        damping: rho >= 0, relative to the mean eigenvalue tr H_t / p.
        normalize: `none` or `trace`.
    """

    def __init__(
        self, metrics: Tensor, weights: Tensor, *, damping: float = 1e-6, normalize: Normalization = "none"
    ) -> None:
        traces = metrics.diagonal(dim1=1, dim2=2).sum(1)
        means = traces / metrics.shape[1]
        gains = weights * _inverse(traces) if normalize == "trace" else weights.clone()
        scale = (gains * means).sum()
        self.scale = float(scale)
        self.flat = not self.scale > 0
        gains = gains / scale if not self.flat else torch.zeros_like(gains)
        shifts = gains * damping * means if not self.flat else weights
        identity = torch.eye(metrics.shape[1], dtype=metrics.dtype, device=metrics.device)
        self.metrics = gains[:, None, None] * metrics + shifts[:, None, None] * identity
        self.total = self.metrics.sum(0)

    @property
    def tasks(self) -> int:
        return int(self.metrics.shape[0])

    def trace(self, task: int) -> float:
        return float(self.metrics[task].trace())

    def apply(self, x: Tensor) -> Tensor:
        return self.total @ x

    def weighted_sum(self, coordinates: Tensor) -> Tensor:
        return torch.einsum("tij,tj->i", self.metrics, coordinates)

    def dense(self, task: int | None = None) -> Tensor:
        return self.total if task is None else self.metrics[task]

    def preconditioner(self) -> Callable[[Tensor], Tensor]:
        """The inverse itself: one step of conjugate gradients then solves, a second one mends rounding."""
        return _cholesky_solver(self.total)


def kronecker_metrics(basis: TaggedBasis, inputs: Tensor, outputs: Tensor) -> Tensor:
    """H_t = (U^T S_t U) o (V^T A_t V), T x p x p, from A_t (T x n x n) and S_t (T x m x m)."""
    pairs = zip(inputs, outputs, strict=True)
    u, v = basis.u, basis.v
    return torch.stack([(u.mT @ (s @ u)) * (v.mT @ (a @ v)) for a, s in pairs])


def shrunk(metrics: Tensor, share: Tensor) -> Tensor:
    """(1 - share) H_t + share (tr H_t / p) I: N samples give H_t a rank of at most N.

    Args:
        metrics: T x p x p.
        share: length T, in [0, 1].
    """
    means = metrics.diagonal(dim1=1, dim2=2).mean(1)
    identity = torch.eye(metrics.shape[1], dtype=metrics.dtype, device=metrics.device)
    return (1 - share)[:, None, None] * metrics + (share * means)[:, None, None] * identity


def _inverse(values: Tensor) -> Tensor:
    """1 / x, and 0 for a task without curvature."""
    return torch.where(values > 0, 1 / values, torch.zeros_like(values))


def _cholesky_solver(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):  # dependent atoms make H singular; conjugate gradients stay in its range without help
        return lambda r: r
    return lambda r: torch.cholesky_solve(r.unsqueeze(1), factor).squeeze(1)
