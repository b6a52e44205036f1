"""Truncated SVD, polar factor, conjugate gradients against LAPACK and against what defines them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_epimer.numerics.linalg import conjugate_gradient, polar_factor, truncated_svd


def matrix_with_spectrum(m: int, n: int, s: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, len(s), generator=generator))[0]
    v = torch.linalg.qr(torch.randn(n, len(s), generator=generator))[0]
    return (u * s) @ v.mT


@pytest.mark.parametrize(("m", "n"), [(256, 256), (640, 192), (192, 640)])
@pytest.mark.parametrize("decay", [0.3, 0.7, 1.5])
def test_truncated_svd_gives_the_best_low_rank_approximation(m: int, n: int, decay: float) -> None:
    a = matrix_with_spectrum(m, n, (1 + torch.arange(min(m, n)) / 4) ** -decay)
    u, s, v = truncated_svd(a, 16)
    ru, rs, rvh = torch.linalg.svd(a.double(), full_matrices=False)
    best = (ru[:, :16] * rs[:16]) @ rvh[:16]
    assert ((u * s) @ v.mT - best).norm() / best.norm() < 5e-4
    assert torch.allclose(s.double(), rs[:16], rtol=1e-4)


def test_many_triples_are_found_in_wider_blocks() -> None:
    a = matrix_with_spectrum(640, 560, (1 + torch.arange(560) / 4) ** -0.7)
    u, s, v = truncated_svd(a, 96)
    ru, rs, rvh = torch.linalg.svd(a.double(), full_matrices=False)
    best = (ru[:, :96] * rs[:96]) @ rvh[:96]
    assert ((u * s) @ v.mT - best).norm() / best.norm() < 5e-4
    assert torch.allclose(s.double(), rs[:96], rtol=1e-4)


def test_truncated_svd_of_pure_noise_is_right_too() -> None:
    """No gap anywhere: the hardest spectrum for an iteration, the one that it must not pretend to have solved."""
    a = torch.randn(300, 300, generator=torch.Generator().manual_seed(1))
    u, s, v = truncated_svd(a, 32)
    ru, rs, rvh = torch.linalg.svd(a.double(), full_matrices=False)
    best = (ru[:, :32] * rs[:32]) @ rvh[:32]
    assert ((u * s) @ v.mT - best).norm() / best.norm() < 2e-3


def test_truncated_svd_is_deterministic_and_survives_low_rank() -> None:
    a = matrix_with_spectrum(256, 200, torch.ones(5))
    first, second = truncated_svd(a, 32), truncated_svd(a, 32)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert ((first.u * first.s) @ first.v.mT - a).norm() / a.norm() < 1e-5


@pytest.mark.parametrize(("m", "n"), [(256, 256), (640, 192), (192, 640)])
@pytest.mark.parametrize("last", [0.3, 1e-2, 1e-4, 1e-7])
def test_a_large_part_of_the_triples_is_orthonormal_and_right(m: int, n: int, last: float) -> None:
    """From the Gram matrix, where squaring leaves them so; with small singular values it does not."""
    a = matrix_with_spectrum(m, n, torch.logspace(0, math.log10(last), 192))
    u, s, v = truncated_svd(a, 96)
    ru, rs, rvh = torch.linalg.svd(a.double(), full_matrices=False)
    best = (ru[:, :96] * rs[:96]) @ rvh[:96]
    assert ((u * s) @ v.mT - best).norm() / best.norm() < 1e-4
    for vectors in (u, v):
        assert (vectors.mT @ vectors - torch.eye(96)).norm() < 5e-3
    assert bool((s[:-1] >= s[1:]).all())


def test_triples_of_a_matrix_of_low_rank_are_no_copies_of_the_leading_ones() -> None:
    a = matrix_with_spectrum(256, 200, torch.linspace(1, 0.5, 5))
    u, s, _ = truncated_svd(a, 96)
    assert float(s[5]) < 1e-5
    assert (u.mT @ u - torch.eye(96)).norm() < 1e-3


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 40), st.integers(0, 10_000))
def test_polar_factor_is_the_orthogonal_procrustes_solution(m: int, p: int, seed: int) -> None:
    p = min(m, p)
    a = torch.randn(m, p, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    a = a / a.norm(dim=0)
    s = torch.linalg.svdvals(a)
    if s[-1] < 1e-3 * s[0]:
        return
    u = polar_factor(a)
    assert torch.allclose(u.mT @ u, torch.eye(p, dtype=torch.float64), atol=1e-8)
    product = u.mT @ a  # the polar decomposition: U^T M is symmetric positive definite
    assert torch.allclose(product, product.mT, atol=1e-8)
    assert torch.linalg.eigvalsh(product).min() > 0


@pytest.mark.parametrize("smallest", [1.0, 0.05, 0.002])
def test_polar_factor_in_single_precision(smallest: float) -> None:
    """Well and badly conditioned columns take different paths; both agree with the SVD in double precision."""
    m = matrix_with_spectrum(300, 60, torch.linspace(1, smallest, 60))
    p, _, qh = torch.linalg.svd(m.double(), full_matrices=False)
    assert (polar_factor(m) - p @ qh).abs().max() < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_polar_factor_of_bases_that_fill_the_space(seed: int) -> None:
    """As many columns as rows, as TSV-M has them: the smallest singular values lie far below all others."""
    generator = torch.Generator().manual_seed(seed)
    m = torch.cat([torch.linalg.qr(torch.randn(256, 32, generator=generator))[0] for _ in range(8)], dim=1)
    p, s, qh = torch.linalg.svd(m.double())
    assert 1e-4 < float(s[-1] / s[0]) < 1e-2
    found = polar_factor(m)
    assert (found - p @ qh).abs().max() < 1e-5
    assert (found.mT @ found - torch.eye(256)).abs().max() < 5e-6


def test_polar_factor_of_repeated_columns_is_a_partial_isometry() -> None:
    q = torch.linalg.qr(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)))[0]
    u = polar_factor(torch.cat([q, q], dim=1))
    assert torch.allclose(u, torch.cat([q, q], dim=1) / 2**0.5, atol=1e-5)


def test_polar_factor_does_not_depend_on_the_order_of_columns() -> None:
    m = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(polar_factor(m)[:, order], polar_factor(m[:, order]), atol=1e-12)


def test_polar_factor_refuses_more_columns_than_rows() -> None:
    with pytest.raises(ValueError, match="cap the rank"):
        polar_factor(torch.randn(3, 4))


@pytest.mark.parametrize("preconditioned", [False, True])
def test_conjugate_gradients_solve_and_estimate_the_condition(preconditioned: bool) -> None:
    values = torch.linspace(1, 50, 40, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))[0]
    h = (q * values) @ q.mT
    b, x0 = h @ torch.ones(40, dtype=torch.float64), torch.full((40,), 0.5, dtype=torch.float64)
    precondition = (lambda r: torch.linalg.solve(h, r)) if preconditioned else (lambda r: r)
    found = conjugate_gradient(lambda x: h @ x, b - h @ x0, x0, precondition=precondition, tolerance=1e-9)
    assert torch.allclose(found.x, torch.ones(40, dtype=torch.float64), atol=1e-7)
    assert found.steps <= (2 if preconditioned else 60)
    assert found.condition == pytest.approx(1 if preconditioned else 50, rel=0.05)
