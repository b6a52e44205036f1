"""What can be said about one layer before it is merged: what a basis keeps, and whether curvature acts (Theorems 2, 3).

    e_t   = min_x ||D_t - S x||^2, what S keeps is ||D_t||^2 - e_t; S orthonormal: ||S^T vec(D_t)||^2
    eta   = F(c_bar) - F(x),  F(x) = sum l_t (x - c_t)^T H_t (x - c_t), x its minimum (eq 13)         (Theorem 3)
    V_S   = F(x)              R_S = sum l_t r_t^T H_t r_t,  r_t = vec(D_t) - S c_t
    sum l_t [L_t(theta_m) - L_t(theta_t)] <= 1/2 (sqrt(V_S) + sqrt(R_S))^2 + O(3)                     (Theorem 2)
    isotropy deviation = || p H_bar / tr H_bar - I ||_2: at 0 every direction is as steep as any other

H_t is the full curvature diag(v_t + rho mean(v_t)) where it acts on m x n, its projection where it acts on R^p. Layers
add up: eta, V_S and R_S of a model are the sums over its layers, as its curvature is block-diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_epimer.numerics.frechet import frechet_mean
from hf_epimer.numerics.linalg import extreme_eigenvalues
from hf_epimer.numerics.metric import DiagonalMetrics, ProjectedMetrics, diagonal_traces
from hf_epimer.numerics.subspace import TaggedBasis, projected_coordinates


@dataclass(frozen=True)
class CurvatureDiagnosis:
    """Theorems 2 and 3 in numbers, for one layer or the sum over layers.

    Attributes:
        eta: in the units of the curvature: twice the loss, in nats.
        spread: F(c_bar), of which eta is a part.
        eta_trace, spread_trace: the same with every H_t divided by its trace.
        variance: V_S.
        residual: R_S.
        loss: 1/2 sum l_t (S x - D_t)^T H_t (S x - D_t), the second-order rise of the loss itself, at most the bound.
        traces: l_t tr H_t of every task.
    """

    eta: float
    spread: float
    eta_trace: float
    spread_trace: float
    variance: float
    residual: float
    loss: float
    traces: tuple[float, ...]

    @property
    def bound(self) -> float:
        """1/2 (sqrt(V_S) + sqrt(R_S))^2 (Theorem 2)."""
        return 0.5 * (math.sqrt(self.variance) + math.sqrt(self.residual)) ** 2

    @property
    def share(self) -> float:
        """eta / F(c_bar), in [0, 1]: how much of its spread the flat mean could have spared."""
        return _share(self.eta, self.spread)

    @property
    def share_trace(self) -> float:
        """The same with every H_t divided by its trace."""
        return _share(self.eta_trace, self.spread_trace)

    @classmethod
    def total(cls, layers: Sequence[CurvatureDiagnosis]) -> CurvatureDiagnosis:
        """The sum over layers."""
        return cls(
            eta=math.fsum(layer.eta for layer in layers),
            spread=math.fsum(layer.spread for layer in layers),
            eta_trace=math.fsum(layer.eta_trace for layer in layers),
            spread_trace=math.fsum(layer.spread_trace for layer in layers),
            variance=math.fsum(layer.variance for layer in layers),
            residual=math.fsum(layer.residual for layer in layers),
            loss=math.fsum(layer.loss for layer in layers),
            traces=tuple(map(math.fsum, zip(*(layer.traces for layer in layers)))),
        )


def _share(part: float, whole: float) -> float:
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0


def task_gram(task_vectors: Tensor) -> Tensor:
    """<D_s, D_t> of all pairs, T x T in float64: squared norms on the diagonal, cosines after scaling."""
    flat = task_vectors.flatten(1)
    return (flat @ flat.mT).double()


def cosines(gram: Tensor) -> Tensor:
    """The cosine matrix of a Gram matrix, T x T; NaN for a task vector that is zero."""
    norms = gram.diagonal().sqrt()
    return (gram / (norms[:, None] * norms)).clamp(-1, 1)


def kept_energy(basis: TaggedBasis, coordinates: Tensor) -> Tensor:
    """||P D_t||^2 of every task, P the projection onto the span of the atoms, from c_t = S^T vec(D_t), T x p."""
    gram = (basis.u.mT @ basis.u) * (basis.v.mT @ basis.v)
    if bool(((gram.diagonal() - 1).abs() < _DEPENDENT).all()):
        return coordinates.square().sum(1)
    # one checkpoint twice: the atoms are dependent, S^T S is no identity and has to be inverted on its range
    return (coordinates @ torch.linalg.pinv(gram, rtol=_DEPENDENT, hermitian=True) * coordinates).sum(1)


_DEPENDENT = 1e-3
"""How far from 1 the squared length of an atom may be before the atoms count as dependent."""


def curvature_diagnosis(
    basis: TaggedBasis,
    task_vectors: Tensor,
    curvature: Tensor,
    weights: Tensor,
    *,
    damping: float = 1e-6,
    exact: bool = False,
) -> tuple[CurvatureDiagnosis, float]:
    """All that Theorems 2 and 3 say of a layer, and its isotropy deviation.

    Args:
        basis: the tagged basis of the task vectors.
        task_vectors: D_t, T x m x n.
        curvature: v_t, T x m x n.
        weights: l_t, length T.
        damping: rho.
        exact: dense solves.

    Returns:
        The diagnosis and || p H_bar / tr H_bar - I ||_2; zeros and NaN for a layer without curvature.
    """
    c = projected_coordinates(basis, task_vectors)
    metrics = DiagonalMetrics(basis, curvature, weights, damping=damping)
    if metrics.flat:
        return CurvatureDiagnosis(0, 0, 0, 0, 0, 0, 0, (0.0,) * len(c)), math.nan
    normalized = DiagonalMetrics(basis, curvature, weights, damping=damping, normalize="trace")
    flat = weights @ c
    mean = frechet_mean(metrics, c, weights, exact=exact)
    own_traces = diagonal_traces(basis, curvature)
    damped = own_traces + damping * curvature.mean(dim=(1, 2)) * basis.size
    spreads, variances, residuals, losses = (torch.zeros_like(weights) for _ in range(4))
    averaged, merged = basis.expand(flat), basis.expand(mean.value)
    for task, (task_vector, v) in enumerate(zip(task_vectors, curvature, strict=True)):
        steep = v + damping * v.mean()
        inside = basis.expand(c[task])
        spreads[task] = _energy(steep, averaged - inside)
        variances[task] = _energy(steep, merged - inside)
        residuals[task] = _energy(steep, task_vector - inside)
        losses[task] = _energy(steep, merged - task_vector)
    return CurvatureDiagnosis(
        eta=mean.eta * metrics.scale,
        spread=float(weights @ spreads),
        eta_trace=frechet_mean(normalized, c, weights, exact=exact).eta * normalized.scale,
        spread_trace=float((weights * spreads)[damped > 0] @ damped[damped > 0].reciprocal()),
        variance=float(weights @ variances),
        residual=float(weights @ residuals),
        loss=0.5 * float(weights @ losses),
        traces=tuple((weights * own_traces).tolist()),
    ), isotropy_deviation(metrics, basis.s)


def flat_diagnosis(
    task_vectors: Tensor, curvature: Tensor, weights: Tensor, *, damping: float = 1e-6
) -> CurvatureDiagnosis:
    """Theorem 2 for a parameter without a basis, which takes the mean of its task vectors: S = I, R_S = 0, no eta.

    Args:
        task_vectors, curvature: T x any shape.
        weights: l_t, length T.
        damping: rho.
    """
    deviations = task_vectors - torch.tensordot(weights, task_vectors, dims=1)
    pairs = zip(deviations, curvature, strict=True)
    spreads = weights.new_tensor([_energy(v + damping * v.mean(), own) for own, v in pairs])
    variance = float(weights @ spreads)
    return CurvatureDiagnosis(0, 0, 0, 0, variance, 0, 0.5 * variance, (0.0,) * len(weights))


def isotropy_deviation(metrics: ProjectedMetrics, like: Tensor) -> float:
    """|| p H_bar / tr H_bar - I ||_2, from both ends of the spectrum of H_bar; `like` is any vector of length p."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
    low, high = extreme_eigenvalues(metrics.apply, start)
    mean = sum(metrics.trace(task) for task in range(metrics.tasks)) / like.numel()
    return max(high / mean - 1, 1 - low / mean)


def _energy(curvature: Tensor, matrix: Tensor) -> float:
    """<v, A o A>."""
    return float(torch.dot(curvature.flatten(), matrix.square().flatten()))
