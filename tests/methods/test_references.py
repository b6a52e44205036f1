"""The other methods, each against its dense float64 reference, and Proposition 2: they are one method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import reference
from helpers.checkpoints import StateDict
from helpers.merges import MATRIX, VECTOR, error, merged, models
from helpers.statistics import statistics
from hf_epimer import merge_state_dicts
from hf_epimer.methods.fisher_averaging import FisherConfig, GradientMatchingConfig
from hf_epimer.methods.linear import NANConfig, TaskArithmeticConfig
from hf_epimer.methods.regmean import RegMeanConfig
from hf_epimer.methods.ties import TIESConfig
from hf_epimer.methods.tsv import TSVMConfig
from hf_epimer.methods.wudi import WUDIConfig


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
    measured[0] = {name: 30 * value for name, value in measured[0].items()}  # a task with a large loss
    weights, fisher = [m[MATRIX] for m in tuned], [f[MATRIX] for f in measured]
    for normalize, values in (("none", fisher), ("trace", reference.on_one_scale(fisher))):
        expected = reference.fisher_average(base_state[MATRIX], weights, values)
        config: Any = FisherConfig(normalize=normalize)  # type: ignore[arg-type]
        assert error("fisher", expected, base_state, tuned, statistics=measured, config=config) < 1e-5
        expected = reference.gradient_matching(base_state[MATRIX], weights, values)
        config = GradientMatchingConfig(normalize=normalize)  # type: ignore[arg-type]
        assert error("gradient-matching", expected, base_state, tuned, statistics=measured, config=config) < 1e-5


def test_regmean(base_state: StateDict) -> None:
    tuned, measured = models(base_state), statistics("regmean", 3)
    assert measured is not None
    expected = reference.regmean([m[MATRIX] for m in tuned], [g[MATRIX] for g in measured])
    config = RegMeanConfig(damping=0.0)
    assert error("regmean", expected, base_state, tuned, statistics=measured, config=config) < 1e-5


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
        "fisher": (
            torch.stack([f[VECTOR].double() for f in measured]),
            {"statistics": measured, "config": FisherConfig(normalize="none")},
        ),
        "gradient-matching": (
            torch.stack([f[VECTOR].double() + 1e-8 for f in measured]),
            {"statistics": measured, "config": GradientMatchingConfig(normalize="none")},
        ),
    }
    for method, (h, arguments) in cases.items():
        for exact in (False, True):
            x = frechet_mean(Diagonal(h, weights), c, weights, exact=exact, tolerance=1e-8).value
            found = merged(method, base_state, tuned, weights=weights.tolist(), **arguments)[VECTOR]
            assert reference.relative_error(found, start + x, start) < 1e-4, method
