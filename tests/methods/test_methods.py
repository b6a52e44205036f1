"""Every method of the METHODS table under the same invariants, and each against its dense float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import reference
from helpers.checkpoints import StateDict, tiny_fisher, tiny_state
from helpers.statistics import statistics
from hf_epimer import EpiMerConfig, merge_state_dicts
from hf_epimer.errors import MismatchError, StatisticsError, UsageError
from hf_epimer.methods import METHODS
from hf_epimer.methods.epimer_core import EpiMerCoreConfig
from hf_epimer.methods.linear import NANConfig, TaskArithmeticConfig
from hf_epimer.methods.regmean import RegMeanConfig
from hf_epimer.methods.statistic import FISHER_DIAGONAL, PROJECTED_FISHER
from hf_epimer.methods.ties import TIESConfig
from hf_epimer.methods.tsv import TSVMConfig
from hf_epimer.methods.wudi import WUDIConfig
from hf_epimer.numerics.subspace import tagged_basis

ALL = list(METHODS)
MATRIX = "vision_model.encoder.layers.0.mlp.fc1.weight"
VECTOR = "vision_model.encoder.layers.0.mlp.fc1.bias"


def models(base: StateDict, tasks: int = 3) -> list[StateDict]:
    return [tiny_state(t + 1, base) for t in range(tasks)]


def merged(method: str, base: StateDict, tuned: list[StateDict], **arguments: Any) -> StateDict:
    arguments.setdefault("statistics", statistics(method, len(tuned)))
    return merge_state_dicts(base, tuned, method=method, **arguments)


def distance(a: StateDict, b: StateDict, base: StateDict) -> float:
    """Largest relative difference of two merged task vectors over all parameters."""
    return max(float((a[n] - b[n]).norm() / (a[n] - base[n]).norm().clamp_min(1e-12)) for n in base)


@pytest.mark.parametrize("method", ALL)
def test_shape_dtype_and_finiteness(method: str, base_state: StateDict) -> None:
    half = {name: value.half() for name, value in base_state.items()}
    mixed = [{n: v.to(dtype) for n, v in m.items()} for m, dtype in zip(models(base_state), _DTYPES, strict=True)]
    result = merged(method, half, mixed)
    assert result.keys() == half.keys()
    assert all(result[n].shape == half[n].shape and result[n].dtype == torch.float16 for n in half)
    assert all(bool(v.isfinite().all()) for v in result.values())


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("method", ALL)
def test_base_merged_with_itself_is_the_base_exactly(method: str, base_state: StateDict) -> None:
    result = merged(method, base_state, [dict(base_state) for _ in range(3)])
    assert all(torch.equal(result[n], base_state[n]) for n in base_state)


@pytest.mark.parametrize("method", ALL)
def test_order_of_tasks_does_not_matter(method: str, base_state: StateDict) -> None:
    tuned, labels = models(base_state), ["a", "b", "c"]
    measured = statistics(method, 3)
    first = merged(method, base_state, tuned, labels=labels, statistics=measured)
    order = [2, 0, 1]
    second = merged(
        method,
        base_state,
        [tuned[i] for i in order],
        labels=[labels[i] for i in order],
        statistics=measured and [measured[i] for i in order],
    )
    assert distance(first, second, base_state) < 1e-4


@pytest.mark.parametrize("method", ALL)
def test_same_seed_same_bits(method: str, base_state: StateDict) -> None:
    first, second = (merged(method, base_state, models(base_state), seed=7) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("method", ALL)
def test_weights_are_normalised_and_matter(method: str, base_state: StateDict) -> None:
    tuned = models(base_state)
    equal, scaled = (merged(method, base_state, tuned, weights=w) for w in (None, [4.0, 4.0, 4.0]))
    assert distance(equal, scaled, base_state) < 1e-5
    assert distance(equal, merged(method, base_state, tuned, weights=[4.0, 1.0, 1.0]), base_state) > 1e-3


@pytest.mark.parametrize("method", ALL)
def test_alpha_scales_the_whole_merged_task_vector(method: str, base_state: StateDict) -> None:
    if not hasattr(METHODS[method].config(), "alpha"):
        return
    default = METHODS[method].config()
    doubled = METHODS[method].config(alpha=2 * default.alpha)
    one = merged(method, base_state, models(base_state), config=default)
    two = merged(method, base_state, models(base_state), config=doubled)
    for name in base_state:
        assert torch.allclose(two[name] - base_state[name], 2 * (one[name] - base_state[name]), atol=1e-5)


@pytest.mark.parametrize("method", sorted(set(ALL) - {"dare", "ties", "iso-c", "iso-cts", "task-arithmetic"}))
def test_identical_models_give_that_model_back(method: str, base_state: StateDict) -> None:
    """Spectral methods keep the leading directions only, so the task vectors have rank 1 here. TIES and DARE thin
    them out, Iso changes their spectrum, task arithmetic adds them up: for those it is no invariant."""
    model = {}
    for name, value in models(base_state, 1)[0].items():
        delta = value - base_state[name]
        if delta.ndim == 2:
            u, s, vh = torch.linalg.svd(delta, full_matrices=False)
            delta = (u[:, :1] * s[:1]) @ vh[:1]
        model[name] = base_state[name] + delta
    result = merged(method, base_state, [model] * 3)
    assert distance({n: model[n] for n in base_state}, result, base_state) < 1e-3


@pytest.mark.parametrize("method", ALL)
def test_exact_mode_agrees_with_the_default(method: str, base_state: StateDict) -> None:
    tuned = models(base_state)
    assert distance(merged(method, base_state, tuned), merged(method, base_state, tuned, exact=True), base_state) < 1e-3


# --- against the references -----------------------------------------------------------------------------------------


def error(method: str, expected: Any, base: StateDict, tuned: list[StateDict], **arguments: Any) -> float:
    result = merged(method, base, tuned, **arguments)
    return reference.relative_error(result[MATRIX], expected, base[MATRIX])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("aggregator", ["sum", "mean"])
@pytest.mark.parametrize("coordinates", ["projected", "tagged"])
@pytest.mark.parametrize("normalize", ["none", "trace"])
@pytest.mark.parametrize("damping", [0.0, 1e-6, 10.0])
def test_epimer_solves_equations_13_and_14(
    base_state: StateDict, exact: bool, aggregator: str, coordinates: str, normalize: str, damping: float
) -> None:
    if exact:  # or the rounding of the stored result would be all that is measured
        base_state = {name: value.double() for name, value in base_state.items()}
    tuned, measured = models(base_state), statistics("epimer", 3)
    assert measured is not None
    options: dict[str, Any] = {
        "rank": 6, "alpha": 0.7, "aggregator": aggregator, "coordinates": coordinates,
        "normalize": normalize, "damping": damping,
    }  # fmt: skip
    weights = [0.5, 0.2, 0.3]
    expected, _ = reference.epimer(
        base_state[MATRIX], [m[MATRIX] for m in tuned], [f[MATRIX] for f in measured], weights=weights, **options
    )
    config = EpiMerConfig(**options)
    found = merged("epimer", base_state, tuned, config=config, weights=weights, exact=exact, statistics=measured)
    assert reference.relative_error(found[MATRIX], expected, base_state[MATRIX]) < (1e-6 if exact else 1e-3)
    mean = sum(w * (m[VECTOR] - base_state[VECTOR]) for w, m in zip(weights, tuned, strict=True))
    assert torch.allclose(found[VECTOR], base_state[VECTOR] + 0.7 * mean, atol=1e-6)


def test_epimer_caps_the_rank_where_orthonormal_columns_end(base_state: StateDict) -> None:
    name = "vision_model.embeddings.position_embedding.weight"  # 5 x 32: with three tasks, one direction each
    tuned, measured = models(base_state), statistics("epimer", 3)
    assert measured is not None
    expected, _ = reference.epimer(base_state[name], [m[name] for m in tuned], [f[name] for f in measured], rank=32)
    found = merged("epimer", base_state, tuned, statistics=measured)
    assert reference.relative_error(found[name], expected, base_state[name]) < 1e-3


def test_equal_metrics_give_alpha_times_the_sum(base_state: StateDict) -> None:
    """The homogeneous limit of eq 14: with tagged coordinates it is TSV-M."""
    tuned, one = models(base_state), tiny_fisher(5)
    config = EpiMerConfig(rank=8, coordinates="tagged", damping=0.0)
    found = merged("epimer", base_state, tuned, statistics=[one] * 3, config=config)
    expected = merged("tsv-m", base_state, tuned, config=TSVMConfig(rank=8))
    assert distance(expected, found, base_state) < 1e-4


def test_huge_damping_is_tsv_m(base_state: StateDict) -> None:
    tuned = models(base_state)
    equal_means = [{n: v / v.mean() for n, v in f.items()} for f in (tiny_fisher(t) for t in range(3))]
    config = EpiMerConfig(rank=8, coordinates="tagged", damping=1e6)
    found = merged("epimer", base_state, tuned, statistics=equal_means, config=config)
    assert distance(merged("tsv-m", base_state, tuned, config=TSVMConfig(rank=8)), found, base_state) < 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e12])
def test_a_common_scale_of_all_metrics_cancels(base_state: StateDict, scale: float) -> None:
    tuned, measured = models(base_state), [tiny_fisher(t) for t in range(3)]
    scaled = [{n: (v.double() * scale).float() for n, v in f.items()} for f in measured]
    one = merged("epimer", base_state, tuned, statistics=measured)
    two = merged("epimer", base_state, tuned, statistics=scaled)
    assert distance(one, two, base_state) < 1e-3


def test_one_task_alone_keeps_its_leading_directions(base_state: StateDict) -> None:
    tuned = models(base_state, 1)
    found = merged("epimer", base_state, tuned, config=EpiMerConfig(rank=4))
    u, s, vh = torch.linalg.svd(tuned[0][MATRIX] - base_state[MATRIX], full_matrices=False)
    expected = base_state[MATRIX] + (u[:, :4] * s[:4]) @ vh[:4]
    assert reference.relative_error(found[MATRIX], expected, base_state[MATRIX]) < 1e-3


def test_a_layer_that_a_task_left_alone_brings_no_directions(base_state: StateDict) -> None:
    tuned, measured = models(base_state), statistics("epimer", 3)
    assert measured is not None
    tuned[1][MATRIX] = base_state[MATRIX].clone()
    found = merged("tsv-m", base_state, tuned, config=TSVMConfig(rank=5))
    expected = reference.tsv_m(base_state[MATRIX], [tuned[0][MATRIX], tuned[2][MATRIX]], rank=5)
    assert reference.relative_error(found[MATRIX], expected, base_state[MATRIX]) < 1e-3
    assert bool(merged("epimer", base_state, tuned, statistics=measured)[MATRIX].isfinite().all())


def test_no_curvature_at_all_is_the_flat_metric(base_state: StateDict) -> None:
    tuned = models(base_state)
    nothing = [{n: torch.zeros_like(v) for n, v in base_state.items()} for _ in tuned]
    found = merged("epimer", base_state, tuned, statistics=nothing, config=EpiMerConfig(rank=8, coordinates="tagged"))
    assert distance(merged("tsv-m", base_state, tuned, config=TSVMConfig(rank=8)), found, base_state) < 1e-4


def test_tsv_m(base_state: StateDict) -> None:
    tuned = models(base_state)
    for rank in (None, 4):
        expected = reference.tsv_m(base_state[MATRIX], [m[MATRIX] for m in tuned], rank=rank)
        assert error("tsv-m", expected, base_state, tuned, config=TSVMConfig(rank=rank)) < 1e-3
        doubled = {name: value.double() for name, value in base_state.items()}  # or its rounding is all one sees
        assert error("tsv-m", expected, doubled, tuned, config=TSVMConfig(rank=rank), exact=True) < 1e-6


def test_iso(base_state: StateDict) -> None:
    tuned = models(base_state)
    weights = [m[MATRIX] for m in tuned]
    assert error("iso-c", reference.iso_c(base_state[MATRIX], weights), base_state, tuned) < 1e-4
    assert error("iso-cts", reference.iso_cts(base_state[MATRIX], weights), base_state, tuned) < 1e-3


def test_linear_methods(base_state: StateDict) -> None:
    tuned = models(base_state)
    total = sum(m[MATRIX].double() - base_state[MATRIX].double() for m in tuned)
    start = base_state[MATRIX].double()
    assert error("mean", start + total / 3, base_state, tuned) < 1e-6
    config = TaskArithmeticConfig(alpha=0.4)
    assert error("task-arithmetic", start + 0.4 * total, base_state, tuned, config=config) < 1e-6
    for norm in ("parameters", "task-vector"):
        sizes = [
            torch.cat([(m[n] - base_state[n] * (norm == "task-vector")).flatten() for n in m]).double().norm()
            for m in tuned
        ]
        q = torch.stack([1 / size for size in sizes])
        step = sum(w / q.sum() * (m[MATRIX].double() - start) for w, m in zip(q, tuned, strict=True))
        assert error("nan", start + step, base_state, tuned, config=NANConfig(norm=norm)) < 1e-5


@pytest.mark.parametrize("election", ["mass", "count"])
@pytest.mark.parametrize("trim", ["model", "layer"])
@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
def test_ties(base_state: StateDict, election: Any, trim: Any, density: float) -> None:
    tuned = models(base_state)
    names = list(base_state) if trim == "model" else [MATRIX]
    expected = reference.ties(
        [[m[n] for n in names] for m in tuned], [base_state[n] for n in names], density=density, election=election
    )[names.index(MATRIX)]
    config = TIESConfig(density=density, election=election, trim=trim)
    assert error("ties", expected, base_state, tuned, config=config) < 1e-5


def test_fisher_averages(base_state: StateDict) -> None:
    tuned, measured = models(base_state), statistics("fisher", 3)
    assert measured is not None
    weights, fisher = [m[MATRIX] for m in tuned], [f[MATRIX] for f in measured]
    expected = reference.fisher_average(base_state[MATRIX], weights, fisher)
    assert error("fisher", expected, base_state, tuned, statistics=measured) < 1e-5
    expected = reference.gradient_matching(base_state[MATRIX], weights, fisher)
    assert error("gradient-matching", expected, base_state, tuned, statistics=measured) < 1e-5


def test_regmean(base_state: StateDict) -> None:
    tuned, measured = models(base_state), statistics("regmean", 3)
    assert measured is not None
    expected = reference.regmean([m[MATRIX] for m in tuned], [g[MATRIX] for g in measured])
    config = RegMeanConfig(damping=0.0)
    assert error("regmean", expected, base_state, tuned, statistics=measured, config=config) < 1e-5


# --- the full core ---------------------------------------------------------------------------------------------------


def core_error(config: EpiMerCoreConfig, expected: Any, base: StateDict, **arguments: Any) -> float:
    doubled = {name: value.double() for name, value in base.items()}
    return error("epimer-core", expected, doubled, models(base), config=config, exact=True, **arguments)


@pytest.mark.parametrize("scaffold", ["tsv-m", "iso-c"])
@pytest.mark.parametrize("metric", ["kronecker", "inputs", "task-vectors"])
@pytest.mark.parametrize("rho", [0.01, 3.0])
def test_epimer_core_minimises_its_objective(base_state: StateDict, scaffold: str, metric: str, rho: float) -> None:
    measured = None if metric == "task-vectors" else statistics("epimer-core", 3)
    outputs = [s[f"{MATRIX}.output_factor"] for s in measured] if measured and metric == "kronecker" else None
    inputs = [s[f"{MATRIX}.input_factor"] for s in measured] if measured else None
    if metric == "inputs" and measured:
        measured = [{n.removesuffix(".input_factor"): v for n, v in s.items() if "input" in n} for s in measured]
    weights = [0.5, 0.2, 0.3]
    expected = reference.epimer_core(
        base_state[MATRIX], [m[MATRIX] for m in models(base_state)], outputs, inputs, weights, 6, rho, scaffold
    )
    config = EpiMerCoreConfig(rank=6, rho=rho, metric=metric, scaffold=scaffold)  # type: ignore[arg-type]
    assert core_error(config, expected, base_state, statistics=measured, weights=weights) < 1e-5


def test_epimer_core_pulled_hard_is_its_scaffold(base_state: StateDict) -> None:
    tsv = merged("tsv-m", base_state, models(base_state), config=TSVMConfig(rank=6))
    held = merged("epimer-core", base_state, models(base_state), config=EpiMerCoreConfig(rank=6, rho=1e7))
    free = merged("epimer-core", base_state, models(base_state), config=EpiMerCoreConfig(rank=6, rho=0.1))
    assert distance(tsv, held, base_state) < 1e-4 < 1e-2 < distance(tsv, free, base_state)


def test_epimer_core_on_a_complete_basis_without_labels_is_regmean() -> None:
    """Square layers, rank n / T: the basis spans all m n directions, so the core is the whole weight."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(12, 12, generator=generator, dtype=torch.float64)}
    tuned = [{"w": base["w"] + torch.randn(12, 12, generator=generator, dtype=torch.float64)} for _ in range(3)]
    inputs = []
    for _ in range(3):
        x = torch.randn(50, 12, generator=generator, dtype=torch.float64)
        gram = x.mT @ x
        inputs.append({"w": gram / gram.trace()})  # one scale for all, as the weights w_t would give them
    config = EpiMerCoreConfig(rank=4, metric="inputs", rho=1e-9)
    core = merge_state_dicts(base, tuned, method="epimer-core", config=config, statistics=inputs, exact=True)
    expected = reference.regmean([t["w"] for t in tuned], [g["w"] for g in inputs], decay=1.0)
    assert reference.relative_error(core["w"], expected, base["w"]) < 1e-5


def test_epimer_core_of_diagonal_curvature_is_epimers_kronecker_metric() -> None:
    """Task vectors on disjoint axes and diagonal factors: nothing couples two atoms, and no residual is left out."""
    base, tuned, measured = {"w": torch.zeros(6, 6, dtype=torch.float64)}, [], []
    generator = torch.Generator().manual_seed(0)
    for task in range(2):
        delta = torch.zeros(6, 6, dtype=torch.float64)
        for i in range(3 * task, 3 * task + 3):
            delta[i, i] = 1.0 + i
        tuned.append({"w": delta})
        s, a = torch.rand(2, 6, generator=generator, dtype=torch.float64) + 0.1
        s, a = s / s.mean(), a / a.mean()
        measured.append({"w.input_factor": torch.diag(a), "w.output_factor": torch.diag(s)})
    full = EpiMerCoreConfig(rank=3, rho=1e-9)
    core = merge_state_dicts(base, tuned, method="epimer-core", config=full, statistics=measured, exact=True)
    atoms = EpiMerConfig(rank=3, metric="kronecker", aggregator="mean", damping=0.0)
    epimer = merge_state_dicts(base, tuned, config=atoms, statistics=measured, exact=True)
    assert torch.allclose(core["w"], epimer["w"], atol=1e-6) and bool(core["w"].any())


@pytest.mark.parametrize("damping", [0.1, 10.0])
def test_wudi_minimises_its_objective(base_state: StateDict, damping: float) -> None:
    tuned, weights = models(base_state), [0.5, 0.2, 0.3]
    expected = reference.wudi(base_state[MATRIX], [m[MATRIX] for m in tuned], weights, damping)
    assert error("wudi", expected, base_state, tuned, weights=weights, config=WUDIConfig(damping=damping)) < 1e-5


def test_dare_keeps_the_mean_and_the_share() -> None:
    big = {"w": torch.zeros(400, 400)}
    result = merge_state_dicts(big, [{"w": torch.ones(400, 400)}], method="dare", labels=["x"])["w"]
    assert torch.allclose(result.unique(), torch.tensor([0.0, 10.0]))
    assert float(result.mean()) == pytest.approx(1.0, abs=0.03)
    other = merge_state_dicts(big, [{"w": torch.ones(400, 400)}], method="dare", labels=["x"], seed=1)["w"]
    assert not torch.equal(result, other)
    both = merge_state_dicts(big, [{"w": torch.ones(400, 400)}] * 2, method="dare", labels=["x", "y"])["w"]
    assert torch.allclose(both.unique(), torch.tensor([0.0, 5.0, 10.0]))  # every task has a mask of its own


# --- Proposition 2: the methods are one method ----------------------------------------------------------------------


def test_fisher_averaging_and_gradient_matching_are_frechet_means_with_s_the_identity(base_state: StateDict) -> None:
    from hf_epimer.numerics.frechet import frechet_mean

    class Diagonal:
        """H_t = diag(h_t) on the whole parameter space: S = I."""

        def __init__(self, h: torch.Tensor, weights: torch.Tensor) -> None:
            self.h, self.weights, self.tasks = h, weights, len(h)

        def apply(self, x: torch.Tensor) -> torch.Tensor:
            return (self.weights[:, None] * self.h).sum(0) * x

        def weighted_sum(self, c: torch.Tensor) -> torch.Tensor:
            return (self.weights[:, None] * self.h * c).sum(0)

        def dense(self, task: int | None = None) -> torch.Tensor:
            return torch.diag(
                (self.weights[:, None] * self.h).sum(0) if task is None else self.weights[task] * self.h[task]
            )

        def preconditioner(self) -> Any:
            return lambda r: r / (self.weights[:, None] * self.h).sum(0)

    tuned, measured = models(base_state), statistics("fisher", 3)
    assert measured is not None
    start = base_state[VECTOR].double()
    c = torch.stack([m[VECTOR].double() - start for m in tuned])
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    cases = {
        "task-arithmetic": (torch.ones_like(c), {"config": TaskArithmeticConfig(alpha=1 / 3)}),
        "fisher": (torch.stack([f[VECTOR].double() for f in measured]), {"statistics": measured}),
        "gradient-matching": (torch.stack([f[VECTOR].double() + 1e-8 for f in measured]), {"statistics": measured}),
    }
    for method, (h, arguments) in cases.items():
        for exact in (False, True):
            x = frechet_mean(Diagonal(h, weights), c, weights, exact=exact, tolerance=1e-8).value
            found = merged(method, base_state, tuned, weights=weights.tolist(), **arguments)[VECTOR]
            assert reference.relative_error(found, start + x, start) < 1e-4, method


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_every_option_rejects_nonsense(method: str) -> None:
    from dataclasses import fields

    for item in fields(METHODS[method].config):
        bad = "nonsense" if "Literal" in str(item.type) else float("nan")
        with pytest.raises(UsageError, match="--" + item.name.replace("_", "-")):
            METHODS[method].config(**{item.name: bad})


def test_ranks_and_shares_out_of_range() -> None:
    for make in (lambda: EpiMerConfig(rank=0), lambda: TIESConfig(density=1.5), lambda: EpiMerConfig(damping=-1)):
        with pytest.raises(UsageError):
            make()


# --- merge_state_dicts ----------------------------------------------------------------------------------------------


def test_any_architecture_and_any_kind_of_tensor() -> None:
    """Counters, empty tensors, scalars, parameters with gradients, transposed views, rows: nothing special needed."""
    generator = torch.Generator().manual_seed(0)
    base = {
        "w": torch.nn.Parameter(torch.randn(6, 4, generator=generator)),
        "transposed": torch.randn(4, 6, generator=generator).mT,
        "row": torch.randn(1, 5, generator=generator),
        "scale": torch.tensor(2.0),
        "kernel": torch.randn(2, 3, 3, 3, generator=generator),
        "empty": torch.zeros(0, 3),
        "steps": torch.tensor(7),
    }
    tuned = [{n: v.detach() + 1 if v.is_floating_point() else v for n, v in base.items()} for _ in range(2)]
    fisher = [{n: torch.ones_like(v) for n, v in base.items() if v.ndim == 2 and v.numel()} for _ in tuned]
    for method in ALL:
        measured = fisher if METHODS[method].needs is FISHER_DIAGONAL else [{} for _ in tuned]
        if method in ("fisher", "gradient-matching"):
            measured = [{n: torch.ones_like(v) for n, v in base.items() if v.is_floating_point()} for _ in tuned]
        result = merge_state_dicts(base, tuned, method=method, statistics=measured)
        assert list(result) == list(base)
        assert all(result[n].shape == base[n].shape and result[n].dtype == base[n].dtype for n in base), method
        assert int(result["steps"]) == 7
        assert not result["w"].requires_grad


def test_misuse_is_explained(base_state: StateDict) -> None:
    tuned = models(base_state)
    fisher = [tiny_fisher(t) for t in range(3)]
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (StatisticsError, "needs fisher", {}),
        (StatisticsError, "3 models but 2", {"statistics": fisher[:2]}),
        (StatisticsError, "no statistics", {"statistics": [{}, {}, {}]}),
        (UsageError, "takes a EpiMerConfig", {"statistics": fisher, "config": TSVMConfig()}),
        (UsageError, "no method", {"method": "magic"}),
        (UsageError, "3 models, 2 weights", {"statistics": fisher, "weights": [1, 2]}),
        (MismatchError, "has shape", {"statistics": [*fisher[:2], {**fisher[2], MATRIX: torch.ones(2, 2)}]}),
    ]
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message):
            merge_state_dicts(base_state, tuned, **arguments)
    with pytest.raises(MismatchError, match="missing"):
        merge_state_dicts(base_state, [{MATRIX: tuned[0][MATRIX]}], method="mean")
    with pytest.raises(UsageError, match="nothing to merge"):
        merge_state_dicts(base_state, [])


# --- EpiMer's other metrics -----------------------------------------------------------------------------------------


def test_epimers_projected_metric_is_the_diagonal_one_when_that_is_what_is_projected(base_state: StateDict) -> None:
    tuned, measured = models(base_state), statistics("epimer", 3)
    assert measured is not None
    deltas = torch.stack([model[MATRIX] - base_state[MATRIX] for model in tuned])
    basis = tagged_basis(deltas.double(), 5, exact=True)
    assert basis is not None
    s = reference.subspace_matrix(basis.u, basis.v)
    projected = []
    for fisher in measured:
        h = s.mT @ (fisher[MATRIX].double().flatten()[:, None] * s)
        projected.append({MATRIX: h, f"{MATRIX}.shrinkage": torch.zeros(1)})
    only = {MATRIX: base_state[MATRIX]}
    own = [{MATRIX: model[MATRIX]} for model in tuned]
    options = {"rank": 5, "damping": 0.0}
    config = EpiMerConfig(metric="projected", **options)
    found = merge_state_dicts(only, own, config=config, statistics=projected, bases={MATRIX: basis}, exact=True)
    diagonal = merge_state_dicts(
        only, own, config=EpiMerConfig(**options), statistics=[{MATRIX: f[MATRIX]} for f in measured], exact=True
    )
    assert distance(diagonal, found, only) < 1e-5
    # a share of 1 leaves the traces only, whatever was estimated
    flat = EpiMerConfig(metric="projected", shrinkage=1.0, normalize="trace", **options)
    found = merge_state_dicts(only, own, config=flat, statistics=projected, bases={MATRIX: basis}, exact=True)
    c = torch.stack([basis.project(delta.double()) for delta in deltas])
    assert torch.allclose(found[MATRIX].double() - only[MATRIX], basis.expand(c.sum(0)), atol=1e-5)
    for entry in projected:  # Ledoit and Wolf's share is used where none is given
        entry[f"{MATRIX}.shrinkage"] = torch.ones(1)
    config = EpiMerConfig(metric="projected", normalize="trace", **options)
    again = merge_state_dicts(only, own, config=config, statistics=projected, bases={MATRIX: basis}, exact=True)
    assert torch.allclose(again[MATRIX], found[MATRIX], atol=1e-6)


def test_epimers_kronecker_metric_of_a_rank_one_fisher_is_the_diagonal_one(base_state: StateDict) -> None:
    tuned = [{MATRIX: model[MATRIX]} for model in models(base_state)]
    only = {MATRIX: base_state[MATRIX]}
    generator = torch.Generator().manual_seed(0)
    m, n = only[MATRIX].shape
    rows, columns = torch.rand(3, m, generator=generator), torch.rand(3, n, generator=generator)
    diagonals = [{MATRIX: torch.outer(r, c)} for r, c in zip(rows, columns, strict=True)]
    factors = [
        {f"{MATRIX}.input_factor": torch.diag(c), f"{MATRIX}.output_factor": torch.diag(r)}
        for r, c in zip(rows, columns, strict=True)
    ]
    options = {"rank": 5, "damping": 0.0}
    one = merge_state_dicts(only, tuned, config=EpiMerConfig(**options), statistics=diagonals)
    two = merge_state_dicts(only, tuned, config=EpiMerConfig(metric="kronecker", **options), statistics=factors)
    assert distance(one, two, only) < 1e-3
    with pytest.raises(StatisticsError, match="there are no statistics for this parameter"):
        merge_state_dicts(only, tuned, config=EpiMerConfig(metric="kronecker"), statistics=[{}, {}, {}])


def test_options_that_belong_to_another_metric_are_refused() -> None:
    with pytest.raises(UsageError, match="--vectors fisher needs the Fisher diagonal"):
        EpiMerConfig(metric="kronecker", vectors="fisher")
    with pytest.raises(UsageError, match="--shrinkage is of the projected metric"):
        EpiMerConfig(shrinkage=0.5)
    assert METHODS["epimer"].statistic(EpiMerConfig(metric="projected")) is PROJECTED_FISHER
    assert METHODS["epimer"].statistic(EpiMerConfig()) is METHODS["epimer"].needs is FISHER_DIAGONAL


def test_papers_are_cited_by_their_authors() -> None:
    paper = METHODS["epimer"].paper
    people = "Juanwu Lu, Anand Bhaskar, Brian Axelrod, Ekaterina Tolstaya and Tristan Emrich"
    assert paper.names == METHODS["epimer-core"].paper.names == people
    assert "author = {Lu, Juanwu and Bhaskar, Anand and " in paper.bibtex() and "2605.26693" in paper.bibtex()
    assert METHODS["ties"].paper.names == "Prateek Yadav and others"
    assert METHODS["frechet-lora"].paper.cited == "da Silva, arXiv 2026"
