"""Projected metrics H_t = S^T diag(v_t) S (EpiMer eq 12) as linear operators; no p x p matrix unless asked for.

    H_bar x         = S^T (v_bar o (S x)),                  v_bar = sum l_t v_t: one operator for all tasks
    sum l_t H_t c_t = S^T (sum l_t v_t o (S c_t)):          one projection for all tasks
    tr H_t          = <v_t, (U o U) (V o V)^T>

`ProjectedMetrics` is what the Fréchet mean needs to know of a set of metrics; it does not care which kind it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from hf_epimer.numerics.subspace import TaggedBasis

Normalization = Literal["none", "trace"]


class ProjectedMetrics(Protocol):
    """Weighted metrics of T tasks on one subspace of dimension p; the weights are part of them."""

    @property
    def tasks(self) -> int:
        """T."""

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
            energy = basis.u.square() @ basis.v.square().mT
            traces = torch.stack([torch.dot(v.flatten(), energy.flatten()) for v in curvature])
            gains *= torch.where(traces > 0, 1 / traces, torch.zeros_like(traces))
        scale = (gains * means).sum()
        self.scale = float(scale)
        self.flat = not self.scale > 0  # no curvature anywhere in this layer: the metric is Euclidean
        self.gains = gains / scale if not self.flat else torch.zeros_like(gains)
        self.shifts = self.gains * damping * means if not self.flat else weights.clone()
        self.mean_curvature = (self.gains @ curvature.flatten(1)).view(curvature.shape[1:]) + self.shifts.sum()

    @property
    def tasks(self) -> int:
        return int(self.curvature.shape[0])

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
        product = (u.mT @ (u * rows[:, None])) * (v.mT @ (v * columns[:, None]))
        factor, failed = torch.linalg.cholesky_ex(product)
        if bool(failed):  # dependent atoms make H singular; conjugate gradients stay in its range without help
            return lambda r: r
        return lambda r: torch.cholesky_solve(r.unsqueeze(1), factor).squeeze(1)
