"""Tagged basis, projected metrics, Fréchet mean, eta: each against its definition in dense float64."""

from __future__ import annotations

import pytest
import torch

from helpers import reference
from hf_epimer.numerics.frechet import frechet_mean
from hf_epimer.numerics.metric import DenseMetrics, DiagonalMetrics, ProjectedMetrics, kronecker_metrics, shrunk
from hf_epimer.numerics.subspace import (
    TaggedBasis,
    capped_rank,
    projected_coordinates,
    tagged_basis,
    tagged_coordinates,
)

TASKS, M, N, RANK = 4, 48, 40, 5


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(TASKS, M, N, generator=generator, dtype=dtype)
    rows, columns = (torch.randn(TASKS, *s, generator=generator, dtype=dtype) for s in ((M, 1), (1, N)))
    curvature = (rows + columns + 0.5 * torch.randn(TASKS, M, N, generator=generator, dtype=dtype)).exp()
    return deltas, curvature, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=dtype)


def test_the_atoms_are_orthonormal_and_tagged() -> None:
    deltas, _, _ = problem()
    basis = tagged_basis(deltas, RANK)
    assert basis is not None
    assert basis.size == TASKS * RANK
    assert basis.tags.tolist() == [t for t in range(TASKS) for _ in range(RANK)]
    s = reference.subspace_matrix(basis.u, basis.v)
    assert torch.allclose(s.mT @ s, torch.eye(basis.size, dtype=s.dtype), atol=1e-10)
    x = torch.randn(basis.size, dtype=s.dtype, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(basis.expand(x).flatten(), s @ x)
    assert torch.allclose(basis.project(deltas[0]), s.mT @ deltas[0].flatten())
    assert torch.allclose(projected_coordinates(basis, deltas)[2], s.mT @ deltas[2].flatten())


def test_tagged_coordinates_are_the_singular_values_on_the_own_block() -> None:
    deltas, _, _ = problem()
    basis = tagged_basis(deltas, RANK)
    assert basis is not None
    c = tagged_coordinates(basis, TASKS)
    for t in range(TASKS):
        assert torch.allclose(c[t, t * RANK : (t + 1) * RANK], torch.linalg.svdvals(deltas[t])[:RANK])
        assert int((c[t] != 0).sum()) == RANK


@pytest.mark.parametrize("normalize", ["none", "trace"])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_metrics_are_the_projected_diagonals_up_to_one_scale(normalize: str, damping: float) -> None:
    deltas, curvature, weights = problem()
    basis = tagged_basis(deltas, RANK)
    assert basis is not None
    metrics = DiagonalMetrics(basis, curvature, weights, damping=damping, normalize=normalize)  # type: ignore[arg-type]
    s = reference.subspace_matrix(basis.u, basis.v)
    expected = reference.projected_metrics(s, list(curvature), damping, normalize)
    scale = float(metrics.dense(0)[0, 0] / (weights[0] * expected[0][0, 0]))
    for t in range(TASKS):
        assert torch.allclose(metrics.dense(t), scale * weights[t] * expected[t], rtol=1e-8)
    x = torch.randn(basis.size, dtype=s.dtype, generator=torch.Generator().manual_seed(2))
    h_bar = sum(metrics.dense(t) for t in range(TASKS))
    assert torch.allclose(metrics.apply(x), h_bar @ x)
    assert torch.allclose(metrics.dense(), h_bar)
    c = projected_coordinates(basis, deltas)
    assert torch.allclose(metrics.weighted_sum(c), sum(metrics.dense(t) @ c[t] for t in range(TASKS)))
    assert metrics.scale * h_bar[0, 0] == pytest.approx(
        float(sum(weights[t] * expected[t][0, 0] for t in range(TASKS)))
    )


def test_the_preconditioner_inverts_a_rank_one_curvature() -> None:
    deltas, _, weights = problem()
    basis = tagged_basis(deltas, RANK)
    assert basis is not None
    outer = torch.outer(torch.linspace(1, 9, M), torch.linspace(1, 5, N)).double()
    metrics = DiagonalMetrics(basis, outer.expand(TASKS, M, N), weights, damping=0.0)
    x = torch.ones(basis.size, dtype=torch.float64)
    assert torch.allclose(metrics.preconditioner()(metrics.apply(x)), x, atol=1e-8)


@pytest.mark.parametrize("exact", [False, True])
def test_the_mean_minimises_the_objective_and_eta_is_what_it_saves(exact: bool) -> None:
    """Theorems 1 and 3: zero gradient, and F(c_bar) - F(x) = eta >= 0."""
    deltas, curvature, weights = problem()
    basis = tagged_basis(deltas, RANK)
    assert basis is not None
    metrics = DiagonalMetrics(basis, curvature, weights)
    c = projected_coordinates(basis, deltas)
    found = frechet_mean(metrics, c, weights, exact=exact, tolerance=1e-10)
    dense = [metrics.dense(t) for t in range(TASKS)]

    def objective(x: torch.Tensor) -> torch.Tensor:
        return sum((x - c[t]) @ dense[t] @ (x - c[t]) for t in range(TASKS))  # type: ignore[return-value]

    gradient = sum(2 * dense[t] @ (found.value - c[t]) for t in range(TASKS))
    assert float(gradient.norm()) < 1e-7 * float(sum(dense).norm() * c.norm())  # type: ignore[union-attr]
    flat = weights @ c
    assert found.eta == pytest.approx(float(objective(flat) - objective(found.value)), rel=1e-6)
    assert found.eta > 0


def test_eta_is_zero_for_equal_metrics_and_for_equal_task_vectors() -> None:
    deltas, curvature, weights = problem()
    basis = tagged_basis(deltas, RANK)
    assert basis is not None
    c = projected_coordinates(basis, deltas)
    same_metric = DiagonalMetrics(basis, curvature[:1].expand(TASKS, M, N), weights)
    assert abs(frechet_mean(same_metric, c, weights).eta) < 1e-12
    same_vectors = DiagonalMetrics(basis, curvature, weights)
    assert abs(frechet_mean(same_vectors, c[:1].expand(TASKS, -1), weights).eta) < 1e-12


def test_ranks_are_capped_at_what_orthonormal_columns_allow() -> None:
    assert capped_rank(32, (50, 768), 8) == 6
    assert capped_rank(32, (768, 3072), 8) == 32
    assert capped_rank(32, (5, 5), 8) == 0


def test_rank_deficient_task_vectors_bring_fewer_atoms() -> None:
    deltas, _, _ = problem()
    deltas[1] = 0
    deltas[2] = torch.outer(deltas[2, :, 0], deltas[2, 0])
    basis = tagged_basis(deltas, RANK)
    assert basis is not None
    assert basis.tags.bincount().tolist() == [RANK, 0, 1, RANK]
    assert tagged_basis(torch.zeros(3, 10, 10), 2) is None


def test_rounded_products_stay_within_the_promised_accuracy() -> None:
    """Layers of 512 and more use bfloat16 operands where the processor has them; sums over all entries keep 1e-3."""
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(2, 640, 512, generator=generator)
    basis = tagged_basis(deltas, 24)
    assert basis is not None
    curvature = torch.rand(2, 640, 512, generator=generator).square()
    metrics = DiagonalMetrics(basis, curvature, torch.tensor([0.5, 0.5]))
    x = torch.randn(basis.size, generator=generator)
    exact = basis.project(basis.expand(x) * metrics.mean_curvature)
    assert (metrics.apply(x) - exact).norm() / exact.norm() < 1e-3
    c = projected_coordinates(basis, deltas)
    plain = torch.stack([basis.project(d) for d in deltas])
    assert (c - plain).norm() / plain.norm() < 1e-3


def dense_problem() -> tuple[TaggedBasis, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A basis, H_t = S^T diag(v_t) S as dense matrices, the v_t and the weights."""
    deltas, curvature, weights = problem()
    basis = tagged_basis(deltas, RANK, exact=True)
    assert basis is not None
    s = reference.subspace_matrix(basis.u, basis.v)
    return basis, torch.stack([s.mT @ (v.flatten()[:, None] * s) for v in curvature]), curvature, weights


@pytest.mark.parametrize("normalize", ["none", "trace"])
def test_dense_and_diagonal_metrics_are_the_same_operator(normalize: str) -> None:
    basis, h, curvature, weights = dense_problem()
    # damping is relative to the mean of v in one and to tr H / p in the other, which differ; without it all agrees
    dense: ProjectedMetrics = DenseMetrics(h, weights, damping=0.0, normalize=normalize)  # type: ignore[arg-type]
    thin: ProjectedMetrics = DiagonalMetrics(basis, curvature, weights, damping=0.0, normalize=normalize)  # type: ignore[arg-type]
    x, c = torch.randn(basis.size, dtype=h.dtype), torch.randn(TASKS, basis.size, dtype=h.dtype)
    for metrics in (dense, thin):
        assert metrics.tasks == TASKS
        parts = [metrics.dense(t) for t in range(TASKS)]
        assert torch.allclose(sum(parts), metrics.dense())
        assert torch.allclose(metrics.apply(x), metrics.dense() @ x)
        assert torch.allclose(metrics.weighted_sum(c), sum(p @ c[t] for t, p in enumerate(parts)))
        for t, part in enumerate(parts):
            assert metrics.trace(t) == pytest.approx(float(part.trace()))
    assert torch.allclose(dense.dense() * dense.scale, thin.dense() * thin.scale)
    means = [frechet_mean(m, c, weights, tolerance=1e-10) for m in (dense, thin)]
    assert torch.allclose(means[0].value, means[1].value, atol=1e-8)
    assert means[0].eta * dense.scale == pytest.approx(means[1].eta * thin.scale)
    assert means[0].steps <= 2


def test_kronecker_factors_of_a_rank_one_diagonal_give_its_metric() -> None:
    deltas, _, _ = problem()
    basis = tagged_basis(deltas, RANK, exact=True)
    assert basis is not None
    generator = torch.Generator().manual_seed(5)
    rows = torch.rand(TASKS, M, generator=generator, dtype=torch.float64)
    columns = torch.rand(TASKS, N, generator=generator, dtype=torch.float64)
    found = kronecker_metrics(basis, torch.diag_embed(columns), torch.diag_embed(rows))
    s = reference.subspace_matrix(basis.u, basis.v)
    for t in range(TASKS):
        expected = s.mT @ (torch.outer(rows[t], columns[t]).flatten()[:, None] * s)
        assert torch.allclose(found[t], expected)


def test_shrinking_goes_from_the_metric_to_the_flat_one() -> None:
    _, h, _, _ = dense_problem()
    share = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=h.dtype)
    found = shrunk(h, share)
    assert torch.equal(found[0], h[0])
    for t in range(TASKS):
        assert float(found[t].trace()) == pytest.approx(float(h[t].trace()))
    identity = torch.eye(len(h[3]), dtype=h.dtype)
    assert torch.allclose(found[3], float(h[3].trace()) / len(identity) * identity)
    assert torch.allclose(found[2], (h[2] + float(h[2].trace()) / len(identity) * identity) / 2)


def test_metrics_without_any_curvature_are_flat() -> None:
    _, h, _, weights = dense_problem()
    assert DenseMetrics(torch.zeros_like(h), weights).flat
    one = torch.zeros_like(h)
    one[0] = h[0]
    metrics = DenseMetrics(one, weights, normalize="trace")
    assert not metrics.flat
    assert float(metrics.dense(1).abs().max()) == 0
