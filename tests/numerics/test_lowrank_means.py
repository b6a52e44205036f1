"""Means of low-rank matrices: invariance, agreement, special cases, and pymanopt and dense systems as references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helpers import reference
from hf_epimer.numerics.lowrank import MEANS, LowRank, factorize, low_rank, low_rank_mean, union_core
from hf_epimer.numerics.lowrank.polar import affine_invariant_mean, log_euclidean_mean
from hf_epimer.numerics.lowrank.sylvester import kronecker_mean

ALL = list(MEANS)
QUOTIENT = [kind for kind in ALL if kind != "chordal"]
SHAPE = (30, 22)
Pair = tuple[Tensor, Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def adapters(spread: float, ranks: tuple[int, ...] = (4, 4, 4), seed: int = 0) -> list[Pair]:
    """Factors around one adapter; `spread` 0 makes them equal."""
    m, n = SHAPE
    b, a = random(m, max(ranks), seed=seed), random(max(ranks), n, seed=seed + 1)
    found = []
    for t, r in enumerate(ranks):
        db, da = random(m, r, seed=seed + 10 + t), random(r, n, seed=seed + 20 + t)
        found.append((b[:, :r] + spread * db, a[:r] + spread * da))
    return found


def mean(kind: str, pairs: list[Pair], weights: list[float] | None = None, rank: int | None = None) -> Tensor:
    l_t = torch.tensor(weights or [1 / len(pairs)] * len(pairs), dtype=torch.float64)
    return low_rank_mean(kind, [low_rank(b, a) for b, a in pairs], l_t, rank).value.dense()


def turned(pairs: list[Pair], seed: int) -> list[Pair]:
    """The same adapters by other factors: (B G, G^{-1} A)."""
    found = []
    for t, (b, a) in enumerate(pairs):
        g = random(b.shape[1], b.shape[1], seed=seed + t)
        found.append((b @ g, torch.linalg.solve(g, a)))
    return found


def difference(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("spread", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 5, 3)])
def test_other_factors_of_the_same_adapters_give_the_same_mean(
    kind: str, spread: float, ranks: tuple[int, ...]
) -> None:
    pairs, weights = adapters(spread, ranks), [0.5, 0.2, 0.3]
    assert difference(mean(kind, turned(pairs, 7), weights), mean(kind, pairs, weights)) < 1e-10


def test_averages_of_the_factors_are_not_invariant() -> None:
    """What the means are for: the average of B times the average of A is another matrix for other factors."""

    def naive(pairs: list[Pair]) -> Tensor:
        return sum(b for b, _ in pairs) @ sum(a for _, a in pairs) / len(pairs) ** 2  # type: ignore[operator]

    pairs = adapters(0.05)
    assert difference(naive(turned(pairs, 7)), naive(pairs)) > 0.1


@pytest.mark.parametrize("kind", ALL)
def test_scale_of_the_factors_does_not_matter(kind: str) -> None:
    pairs = adapters(0.3)
    scaled = [(b * 1e6, a / 1e6) for b, a in pairs[:1]] + [(b / 1e3, a * 1e3) for b, a in pairs[1:]]
    assert difference(mean(kind, scaled), mean(kind, pairs)) < 1e-10


@pytest.mark.parametrize("kind", ALL)
def test_one_adapter_is_its_own_mean(kind: str) -> None:
    (pair,) = adapters(1.0, (4,))
    assert difference(mean(kind, [pair]), pair[0] @ pair[1]) < 1e-12


@pytest.mark.parametrize("kind", ALL)
def test_equal_adapters_are_their_own_mean(kind: str) -> None:
    (pair,) = adapters(1.0, (4,))
    assert difference(mean(kind, turned([pair, pair, pair], 3)), pair[0] @ pair[1]) < 1e-10


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 5, 3)])
def test_order_does_not_matter(kind: str, ranks: tuple[int, ...]) -> None:
    pairs, weights, order = adapters(0.7, ranks), [0.5, 0.2, 0.3], [2, 0, 1]
    reordered = mean(kind, [pairs[t] for t in order], [weights[t] for t in order])
    assert difference(reordered, mean(kind, pairs, weights)) < 1e-10


@pytest.mark.parametrize("kind", ALL)
def test_isometries_of_both_sides_carry_over(kind: str) -> None:
    p, _ = torch.linalg.qr(random(SHAPE[0], SHAPE[0], seed=50))
    q, _ = torch.linalg.qr(random(SHAPE[1], SHAPE[1], seed=51))
    pairs = adapters(0.7, (2, 5, 3))
    assert difference(mean(kind, [(p @ b, a @ q.mT) for b, a in pairs]), p @ mean(kind, pairs) @ q.mT) < 1e-10


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("rank", [1, 3, 4, 7])
def test_the_rank_asked_for_is_kept(kind: str, rank: int) -> None:
    """Beyond the largest adapter's rank it is a bound: close adapters of rank r have a mean of rank r."""
    found = int(torch.linalg.matrix_rank(mean(kind, adapters(0.7, (2, 4, 3)), rank=rank)))
    assert found == rank if rank <= 4 or kind == "chordal" else 4 <= found <= rank


@pytest.mark.parametrize("kind", QUOTIENT)
def test_a_lower_rank_is_the_mean_truncated(kind: str) -> None:
    """Not the mean of another manifold, and not the chordal mean, at which the iteration only starts."""
    pairs = adapters(0.7)
    whole, low = mean(kind, pairs), mean(kind, pairs, rank=2)
    assert difference(low, factorize(whole).truncated(2).dense()) < 1e-10
    assert difference(low, mean("chordal", pairs, rank=2)) > 1e-3


@pytest.mark.parametrize("kind", ALL)
def test_unequal_ranks_lose_nothing(kind: str) -> None:
    """Ranks 2 and 4, the second an extension of the first: the common part stays, nothing of the rest is cut off."""
    u, v = torch.linalg.qr(random(30, 4, seed=1))[0], torch.linalg.qr(random(22, 4, seed=2))[0]
    s = torch.tensor([9.0, 7.0, 4.0, 2.0], dtype=torch.float64)
    found = mean(kind, [(u[:, :2] * s[:2], v[:, :2].mT), (u * s, v.mT)])
    assert difference(u[:, :2].mT @ found @ v[:, :2], torch.diag(s[:2])) < 1e-8
    assert int(torch.linalg.matrix_rank(found, rtol=1e-6)) == 4


@pytest.mark.parametrize("kind", QUOTIENT)
def test_means_agree_to_second_order_for_close_adapters(kind: str) -> None:
    errors = []
    for spread in (1e-2, 1e-3):
        pairs = adapters(spread)
        errors.append(difference(mean(kind, pairs), mean("chordal", pairs, rank=4)))
    assert errors[0] < 1e-3
    assert errors[1] < errors[0] / 50  # a hundredth, up to terms of third order


@pytest.mark.parametrize("kind", QUOTIENT)
def test_an_adapter_without_the_layer_counts_as_zero(kind: str) -> None:
    pairs = adapters(0.3, (4, 4))
    nothing = (torch.zeros(30, 4, dtype=torch.float64), random(4, 22, seed=9))
    found = mean(kind, [*pairs, nothing], [0.3, 0.3, 0.4])
    assert difference(found, 0.6 * mean(kind, pairs)) < 1e-10
    assert low_rank_mean(kind, [low_rank(*nothing)], torch.ones(1, dtype=torch.float64)).value.rank == 0


def test_chordal_is_the_truncated_mean_of_the_matrices() -> None:
    pairs, weights = adapters(1.0, (2, 5, 3)), [0.5, 0.2, 0.3]
    dense = sum(w * b @ a for w, (b, a) in zip(weights, pairs, strict=True))
    assert difference(mean("chordal", pairs, weights), dense) < 1e-12
    u, s, vh = torch.linalg.svd(dense)
    assert difference(mean("chordal", pairs, weights, rank=3), (u[:, :3] * s[:3]) @ vh[:3]) < 1e-12


def test_chordal_against_optimisation_on_the_manifold_of_fixed_rank() -> None:
    """pymanopt's FixedRankEmbedded, steepest descent on sum l_t ||X - D_t||^2 from a random point."""
    pymanopt = pytest.importorskip("pymanopt")
    import numpy as np
    from pymanopt.manifolds import FixedRankEmbedded
    from pymanopt.optimizers import ConjugateGradient

    m, n, rank, weights = *SHAPE, 4, [0.5, 0.2, 0.3]
    pairs = adapters(0.3)
    target = sum(w * b @ a for w, (b, a) in zip(weights, pairs, strict=True)).numpy()  # type: ignore[union-attr]
    manifold = FixedRankEmbedded(m, n, rank)

    @pymanopt.function.numpy(manifold)
    def cost(u: np.ndarray, s: np.ndarray, vt: np.ndarray) -> float:
        return 0.5 * float(np.sum(((u * s) @ vt - target) ** 2))

    @pymanopt.function.numpy(manifold)
    def euclidean_gradient(u: np.ndarray, s: np.ndarray, vt: np.ndarray) -> tuple[np.ndarray, ...]:
        g = (u * s) @ vt - target
        return g @ vt.T * s, np.diag(u.T @ g @ vt.T), (u * s).T @ g

    np.random.seed(0)
    problem = pymanopt.Problem(manifold, cost, euclidean_gradient=euclidean_gradient)
    found = ConjugateGradient(verbosity=0, max_iterations=2000, min_gradient_norm=1e-9).run(problem).point
    optimum = torch.from_numpy((found[0] * found[1]) @ found[2])
    assert difference(mean("chordal", pairs, weights, rank=rank), optimum) < 1e-6


def test_procrustes_does_not_leave_a_better_place() -> None:
    """Its sum of squared distances is no larger than at the chordal mean or at any adapter."""
    pairs = adapters(1.0)
    points = [low_rank(b, a) for b, a in pairs]

    def stacked(x: LowRank) -> Tensor:
        b, a = x.balanced()
        return torch.cat([b, a.mT])

    def spread(x: LowRank) -> float:
        z = stacked(x)
        return sum(
            float(z.square().sum() + stacked(p).square().sum() - 2 * torch.linalg.svdvals(stacked(p).mT @ z).sum())
            for p in points
        )

    found = factorize(mean("procrustes", pairs))
    assert spread(found) < min(map(spread, [*points, factorize(mean("chordal", pairs, rank=4))]))


def test_polar_averages_scales_geometrically_on_common_subspaces() -> None:
    u, v = torch.linalg.qr(random(30, 3, seed=1))[0], torch.linalg.qr(random(22, 3, seed=2))[0]
    scales = torch.tensor([[8.0, 4.0, 1.0], [2.0, 1.0, 0.25]], dtype=torch.float64)
    for kind in ("polar", "log-polar"):
        found = mean(kind, [(u * s, v.mT) for s in scales])
        assert difference(found, (u * scales.prod(0).sqrt()) @ v.mT) < 1e-8


def test_spd_means() -> None:
    """Two matrices have the closed form A^{1/2} (A^{-1/2} B A^{-1/2})^{1/2} A^{1/2}; congruence carries over."""
    x = torch.stack([y @ y.mT for y in (random(4, 6, seed=1), random(4, 6, seed=2))])
    half = torch.full((2,), 0.5, dtype=torch.float64)

    def power(matrix: Tensor, exponent: float) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values**exponent) @ vectors.mT

    root, inverse = power(x[0], 0.5), power(x[0], -0.5)
    assert difference(affine_invariant_mean(x, half), root @ power(inverse @ x[1] @ inverse, 0.5) @ root) < 1e-10
    c = random(4, 4, seed=3)
    third = torch.cat([x, (c @ c.mT).unsqueeze(0)])
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    moved = affine_invariant_mean(c @ third @ c.mT, weights)
    assert difference(moved, c @ affine_invariant_mean(third, weights) @ c.mT) < 1e-9
    assert difference(log_euclidean_mean(third, weights), affine_invariant_mean(third, weights)) > 1e-3


def test_riemannian_gradient_vanishes() -> None:
    """At the mean the horizontal logarithms of all points, by their defining equations, add up to zero."""
    pairs = adapters(0.3)
    x = factorize(mean("riemannian", pairs))
    b, a = x.balanced()
    total_b, total_a = torch.zeros_like(b), torch.zeros_like(a)
    for b_t, a_t in pairs:
        p = torch.linalg.solve(b.mT @ b, b.mT @ b_t)
        q = a_t @ a.mT @ torch.linalg.inv(a @ a.mT)
        values, vectors = torch.linalg.eig(p @ q)
        root = (vectors * values.sqrt()) @ torch.linalg.inv(vectors)
        g = torch.linalg.solve(p, root.real)  # G P G = Q
        db, da = b_t @ g - b, torch.linalg.solve(g, a_t) - a
        assert difference(b.mT @ db @ (a @ a.mT), (b.mT @ b) @ da @ a.mT) < 1e-8  # horizontal
        assert difference((b + db) @ (a + da), b_t @ a_t) < 1e-10  # and it retracts to D_t
        total_b, total_a = total_b + db, total_a + da
    assert float(total_b.norm() / b.norm() + total_a.norm() / a.norm()) < 1e-7


@pytest.mark.parametrize("kind", QUOTIENT)
def test_far_adapters_are_said_to_be_far(kind: str) -> None:
    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    near = low_rank_mean(kind, [low_rank(*pair) for pair in adapters(0.05)], weights)
    far = low_rank_mean(kind, [low_rank(*pair) for pair in adapters(20.0)], weights)
    assert near.unique and near.angle < 0.3 and not near.note
    assert not far.unique and far.angle > math.pi / 4
    assert "degrees apart" in far.note and "chordal" in far.note


@pytest.mark.parametrize("kind", QUOTIENT)
def test_adapters_that_cancel_have_no_mean_of_their_rank(kind: str) -> None:
    (pair,) = adapters(1.0, (4,))
    opposite = [low_rank(*pair), low_rank(-pair[0], pair[1])]
    found = low_rank_mean(kind, opposite, torch.full((2,), 0.5, dtype=torch.float64))
    assert found.value.rank == 0
    assert not found.unique and "cancel" in found.note


def test_a_sign_that_turns_leaves_no_logarithm_however_close_the_spaces() -> None:
    """diag(3, 3) and diag(3, -1) have the spaces of their mean, diag(3, 1), and the second is out of its reach."""
    identity = torch.eye(6, dtype=torch.float64)[:, :2]
    pairs = [(identity * torch.tensor(signs, dtype=torch.float64), identity.mT) for signs in ([3.0, 3.0], [3.0, -1.0])]
    found = low_rank_mean("riemannian", [low_rank(*pair) for pair in pairs], torch.full((2,), 0.5, dtype=torch.float64))
    assert found.angle < 1e-6
    assert not found.unique and "1 of 2 have no logarithm there: chordal gradient" in found.note


def test_a_tie_in_the_spectrum_is_reported() -> None:
    identity = torch.eye(6, dtype=torch.float64)
    point = [low_rank(identity[:, :2], identity[:2]), low_rank(identity[:, 2:4], identity[2:4])]
    found = low_rank_mean("chordal", point, torch.full((2,), 0.5, dtype=torch.float64), 3)
    assert not found.unique and "equal" in found.note
    assert low_rank_mean("chordal", point, torch.full((2,), 0.5, dtype=torch.float64), 4).unique


def test_the_union_core_is_lossless_and_canonical() -> None:
    pairs = adapters(1.0, (2, 5, 3))
    points = [low_rank(b, a) for b, a in pairs]
    core = union_core(points)
    assert core.cores().shape == (3, 10, 10)
    for (b, a), inside, dense in zip(pairs, core.points, core.cores(), strict=True):
        assert difference(core.expand(inside).dense(), b @ a) < 1e-12
        assert difference(core.left @ dense @ core.right.mT, b @ a) < 1e-12
    other = union_core([low_rank(b, a) for b, a in turned(pairs, 3)][::-1]).cores().flip(0)
    assert float((other.abs() - core.cores().abs()).abs().max()) < 1e-9  # entries up to signs
    twice = union_core([points[0], points[0]])
    assert twice.left.shape == (30, 2)


def curvature(size: int, count: int, seed: int) -> Tensor:
    spectrum = torch.logspace(0, -3, size, dtype=torch.float64)
    found = []
    for t in range(count):
        q, _ = torch.linalg.qr(random(size, size, seed=seed + t))
        found.append((q * spectrum) @ q.mT)
    return torch.stack(found)


@pytest.mark.parametrize("damping", [1e-6, 0.1])
def test_kronecker_weighted_mean_against_the_dense_system(damping: float) -> None:
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    cores, s, a = random(3, 6, 5, seed=1), curvature(6, 3, 10), curvature(5, 3, 20)
    found = kronecker_mean(cores, s, a, weights, damping=damping, tolerance=1e-12)
    scale = sum(float(w * y.trace() * x.trace()) for w, y, x in zip(weights, s, a, strict=True)) / 30
    expected = reference.kronecker_mean(list(cores), list(s), list(a), weights.tolist(), damping * scale)
    assert difference(found.value, expected) < 1e-8
    assert 0 < found.steps < 60

    def loss(x: Tensor) -> float:
        return sum(
            float(w * ((y @ (x - d) @ z) * (x - d)).sum()) for w, d, y, z in zip(weights, cores, s, a, strict=True)
        )

    flat = torch.einsum("t,tij->ij", weights, cores)
    if damping < 1e-3:
        assert found.eta == pytest.approx(loss(flat) - loss(found.value), rel=1e-4)


def test_kronecker_weighted_mean_in_its_limits() -> None:
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    cores, s, a = random(2, 6, 5, seed=1), curvature(6, 2, 10), curvature(5, 2, 20)
    same = kronecker_mean(cores, s[:1].expand(2, -1, -1), a[:1].expand(2, -1, -1), weights)
    assert difference(same.value, cores.mean(0)) < 1e-6
    assert difference(kronecker_mean(cores, s, a, weights, damping=1e9).value, cores.mean(0)) < 1e-6
    none = kronecker_mean(cores, 0 * s, 0 * a, weights)
    assert torch.equal(none.value, torch.einsum("t,tij->ij", weights, cores)) and none.steps == 0
    larger = s * torch.tensor([1.0, 1e3], dtype=torch.float64)[:, None, None]
    plain, traced = (kronecker_mean(cores, larger, a, weights, normalize=how).value for how in ("none", "trace"))
    assert difference(traced, kronecker_mean(cores, s, a, weights, normalize="trace").value) < 1e-6
    assert difference(plain, traced) > 0.01
