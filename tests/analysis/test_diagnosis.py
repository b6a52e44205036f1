"""The numbers of a diagnosis: each against its definition, and Theorem 2 on a loss that is what it assumes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helpers import reference
from hf_epimer import EpiMerConfig, merge_state_dicts
from hf_epimer.analysis.diagnosis import diagnose_layers, rank_totals, spike_totals
from hf_epimer.analysis.diagnosis_report import LayerDiagnosis
from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.methods.epimer_core import EpiMerCoreConfig
from hf_epimer.numerics.diagnostics import cosines, kept_energy
from hf_epimer.numerics.linalg import extreme_eigenvalues
from hf_epimer.numerics.spikes import without_spikes
from hf_epimer.numerics.subspace import projected_coordinates, tagged_basis, task_triples, whitened_basis

TASKS, M, N = 3, 40, 30


WEIGHTS = [0.2, 0.3, 0.5]


def problem(tasks: int = TASKS) -> tuple[Tensor, Tensor]:
    """Task vectors with a decaying spectrum and curvatures of unlike size and shape."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(tasks, M, 12, generator=generator), torch.randn(tasks, 12, N, generator=generator)
    deltas = factors[0] @ factors[1] + 0.3 * torch.randn(tasks, M, N, generator=generator)
    rows, columns = torch.randn(tasks, M, 1, generator=generator), torch.randn(tasks, 1, N, generator=generator)
    noise = 0.5 * torch.randn(tasks, M, N, generator=generator)
    sizes = torch.arange(1.0, tasks + 1).view(-1, 1, 1)
    return 0.01 * deltas, 1e-6 * sizes * (rows + columns + noise).exp()


def layers_of(
    deltas: Tensor, curvature: Tensor | None, ranks: list[int], weights: list[float] | None = None, exact: bool = False
) -> LayerDiagnosis:
    """One matrix named w, as `diagnose` sees it."""
    base = StateDict("base", {"w": torch.zeros(deltas.shape[1:])})
    models = [StateDict(str(task), {"w": own}) for task, own in enumerate(deltas)]
    measured = None if curvature is None else [StateDict("", {"w": own}) for own in curvature]
    ingredients = Ingredients(base, models, weights or [1 / len(deltas)] * len(deltas), measured)
    (found,) = diagnose_layers(ingredients, ranks, exact=exact)
    return found


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_every_quantity_against_the_dense_reference(exact: bool) -> None:
    deltas, curvature = problem()
    found = layers_of(deltas, curvature, [2, 5, 64], WEIGHTS, exact)
    assert found.at[64].rank == N // TASKS
    tolerance = 1e-8 if exact else 2e-3
    for rank, own in found.at.items():
        expected = reference.diagnosis(list(deltas), list(curvature), rank=rank, weights=WEIGHTS)
        assert own.atoms == TASKS * own.rank
        assert own.kept == pytest.approx(expected["kept"], rel=1e-4)
        assert own.singular == pytest.approx(expected["singular"], rel=1e-4)
        assert own.isotropy == pytest.approx(expected["isotropy"], rel=5e-3)
        assert own.curvature is not None
        for name in ("eta", "spread", "eta_trace", "spread_trace", "variance", "residual", "loss", "bound", "traces"):
            assert getattr(own.curvature, name) == pytest.approx(expected[name], rel=tolerance), (rank, name)
    cosine = torch.nn.functional.cosine_similarity(deltas.flatten(1)[:, None], deltas.flatten(1)[None], dim=2)
    assert torch.allclose(cosines(found.gram).float(), cosine, atol=1e-6)
    assert found.norms == pytest.approx(deltas.flatten(1).norm(dim=1).tolist())


def test_eta_is_what_the_frechet_mean_saves_and_v_s_what_it_leaves() -> None:
    """F(c_bar) - F(x) = eta; all three come from different computations."""
    deltas, curvature = problem()
    for own in layers_of(deltas, curvature, [3, 8], WEIGHTS, exact=True).at.values():
        assert own.curvature
        assert own.curvature.spread - own.curvature.variance == pytest.approx(own.curvature.eta, rel=1e-9)
        assert 0 < own.curvature.share < 1
        assert own.curvature.loss < own.curvature.bound


def test_equal_curvatures_have_no_eta_and_a_flat_one_is_isotropic() -> None:
    deltas, curvature = problem()
    same = layers_of(deltas, curvature[:1].expand(TASKS, -1, -1), [4], exact=True).at[4]
    assert same.curvature
    assert same.curvature.share < 1e-12
    sizes = torch.tensor([1.0, 2.0, 7.0]).view(-1, 1, 1)
    flat = layers_of(deltas, 1e-6 * sizes.expand(TASKS, M, N), [4]).at[4]
    assert flat.isotropy < 1e-3
    assert flat.curvature
    assert flat.curvature.share > 0.01  # unlike sizes alone make a weighted mean
    assert flat.curvature.share_trace < 1e-6
    assert [own / sum(flat.curvature.traces) for own in flat.curvature.traces] == pytest.approx([0.1, 0.2, 0.7])


def test_what_stands_out_is_what_epimer_core_cuts() -> None:
    deltas, _ = problem()
    deltas[1] += 3 * torch.outer(torch.ones(M), torch.ones(N)) / (M * N) ** 0.5
    found = layers_of(deltas, None, [4])
    _, gone = without_spikes(deltas, EpiMerCoreConfig().cap)
    assert found.spikes == pytest.approx(gone.tolist(), rel=1e-4)
    assert found.spikes[1] > 0.2 > 10 * max(found.spikes[0], found.spikes[2])
    other = layers_of(deltas.flip(0) * torch.tensor([3.0, 1.0, 0.0]).view(-1, 1, 1), None, [4])
    squares = [[float(layer.gram[task, task]) for layer in (found, other)] for task in range(TASKS)]
    expected = [(a * found.spikes[task] + b * other.spikes[task]) / (a + b) for task, (a, b) in enumerate(squares)]
    assert spike_totals([found, other]) == pytest.approx(expected)


def test_lower_ranks_come_from_one_decomposition() -> None:
    deltas, _ = problem()
    triples = task_triples(deltas.double(), 10, exact=True)
    for rank in (1, 4, 10):
        leading, direct = whitened_basis(triples, rank), tagged_basis(deltas.double(), rank, exact=True)
        assert leading is not None
        assert direct is not None
        x = torch.arange(1.0, leading.size + 1, dtype=torch.float64)
        assert torch.allclose(leading.expand(x), direct.expand(x), atol=1e-10)
        assert torch.equal(leading.tags, direct.tags)


def test_the_order_of_tasks_does_not_matter() -> None:
    deltas, curvature = problem()
    order = [2, 0, 1]
    plain = layers_of(deltas, curvature, [4], WEIGHTS).at[4]
    mixed = layers_of(deltas[order], curvature[order], [4], [WEIGHTS[task] for task in order]).at[4]
    assert plain.curvature
    assert mixed.curvature
    assert mixed.kept == pytest.approx([plain.kept[task] for task in order], rel=1e-5)
    assert mixed.isotropy == pytest.approx(plain.isotropy, rel=5e-3)
    assert mixed.curvature.traces == pytest.approx([plain.curvature.traces[task] for task in order], rel=1e-5)
    for name in ("eta", "spread", "eta_trace", "spread_trace", "variance", "residual", "loss"):
        assert getattr(mixed.curvature, name) == pytest.approx(getattr(plain.curvature, name), rel=1e-3), name


def test_one_checkpoint_twice_keeps_what_one_keeps() -> None:
    deltas, curvature = problem(1)
    once, twice = (tagged_basis(torch.cat([deltas] * copies), 5) for copies in (1, 2))
    assert once is not None
    assert twice is not None
    alone = kept_energy(once, projected_coordinates(once, deltas))
    assert torch.allclose(kept_energy(twice, projected_coordinates(twice, deltas)), alone, rtol=1e-3)
    found = layers_of(torch.cat([deltas] * 2), torch.cat([curvature] * 2), [5]).at[5]
    assert found.curvature
    assert found.curvature.share < 1e-6


def test_unchanged_and_curvature_free_layers_are_left_out_quietly() -> None:
    deltas, curvature = problem()
    deltas[1] = 0
    found = layers_of(deltas, curvature, [4])
    assert found.at[4].kept[1] == found.at[4].singular[1] == 0
    assert cosines(found.gram)[0].isnan().tolist() == [False, True, False]
    assert math.isnan(rank_totals([found], 4).kept[1])
    nothing = layers_of(torch.zeros_like(deltas), curvature, [4])
    assert nothing.at == {}
    assert nothing.mean is not None
    assert nothing.mean.bound == 0
    blind = layers_of(deltas, torch.zeros_like(curvature), [4]).at[4]
    assert blind.curvature is not None
    assert (blind.curvature.share, blind.curvature.bound) == (0, 0)
    assert math.isnan(blind.isotropy)
    assert layers_of(deltas, None, [4]).at[4].curvature is None


def test_the_ends_of_a_spectrum() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0]
    values = torch.cat([torch.linspace(0.5, 2, 299), torch.tensor([9.0])]).double()
    matrix = (q * values) @ q.mT
    start = torch.randn(300, generator=generator, dtype=torch.float64)
    assert extreme_eigenvalues(lambda x: matrix @ x, start) == pytest.approx((0.5, 9.0), abs=1e-2)
    small = matrix[:20, :20]
    ends = torch.linalg.eigvalsh(small)[[0, -1]].tolist()
    assert extreme_eigenvalues(lambda x: small @ x, start[:20], tolerance=0) == pytest.approx(ends, rel=1e-9)
    assert extreme_eigenvalues(lambda x: 3 * x, start) == pytest.approx((3, 3))


# --- Theorem 2 on a loss that is what the theorem assumes -----------------------------------------------------------


NET = {"first.weight": (18, 14), "first.bias": (18,), "second.weight": (16, 12)}


class QuadraticTask:
    """Two linear layers and a bias, fed one coordinate at a time: the loss is quadratic and its Hessian diagonal."""

    def __init__(self, optimum: dict[str, Tensor], generator: torch.Generator) -> None:
        self.optimum = optimum
        self.inputs = {name: torch.rand(shape[-1], generator=generator).double() for name, shape in NET.items()}
        noise = {name: torch.randn(shape[0], generator=generator).double() for name, shape in NET.items()}
        self.steepness = {name: value.exp() for name, value in noise.items()}

    def loss(self, state: dict[str, Tensor]) -> Tensor:
        """1/2 sum over inputs of the squared errors of all outputs, each with its own steepness."""
        total = torch.zeros((), dtype=torch.float64)
        for name, best in self.optimum.items():
            errors = state[name] - best
            outputs = errors @ torch.diag(self.inputs[name]) if errors.ndim == 2 else errors[:, None]
            total = total + 0.5 * (self.steepness[name][:, None] * outputs.square()).sum()
        return total

    def hessian(self) -> dict[str, Tensor]:
        """Its diagonal, by automatic differentiation; the rest is checked to be zero."""
        found = {}
        for name, value in self.optimum.items():
            full = torch.autograd.functional.hessian(lambda x, name=name: self.loss({**self.optimum, name: x}), value)
            full = full.reshape(value.numel(), value.numel())
            assert torch.allclose(full, torch.diag(full.diagonal()))
            found[name] = full.diagonal().view(value.shape)
        return found


def test_the_bound_holds_on_a_quadratic_loss_with_exact_hessians() -> None:
    """Theorem 2 without its O(3): the true losses of the merged net against the bound."""
    generator = torch.Generator().manual_seed(1)

    def draw() -> dict[str, Tensor]:
        return {name: torch.randn(s, generator=generator).double() for name, s in NET.items()}

    base, weights = draw(), [0.5, 0.3, 0.2]
    tuned = [{name: base[name] + 0.2 * value for name, value in draw().items()} for _ in weights]
    tasks = [QuadraticTask(state, generator) for state in tuned]
    hessians = [task.hessian() for task in tasks]
    config = EpiMerConfig(preset="paper", rank=3, aggregator="mean")
    merged = merge_state_dicts(base, tuned, "epimer", config, hessians, weights=weights, exact=True)
    true = sum(weight * float(task.loss(merged)) for weight, task in zip(weights, tasks, strict=True))

    sources = [StateDict(str(index), state) for index, state in enumerate(tuned)]
    measured = [StateDict("", values) for values in hessians]
    layers = list(diagnose_layers(Ingredients(StateDict("base", base), sources, weights, measured), [3], exact=True))
    total = rank_totals(layers, 3).curvature
    assert total is not None
    assert total.loss == pytest.approx(true, rel=1e-5)  # bias and cross terms included
    assert true < total.bound < 3 * true  # it holds, and says something
    parts = [layer.at[3].curvature if layer.at else layer.mean for layer in layers]
    assert [part is not None and part.loss <= part.bound * (1 + 1e-12) for part in parts] == [True] * 3
    crossed = [2 * part.loss - part.variance - part.residual for part in parts if part]
    assert all(
        abs(cross) <= 2 * math.sqrt(part.variance * part.residual) for cross, part in zip(crossed, parts) if part
    )
    assert any(abs(cross) > 0.01 * true for cross in crossed)
