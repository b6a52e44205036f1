"""The full core under Kronecker curvature: its objective and its limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import reference
from helpers.checkpoints import StateDict
from helpers.merges import MATRIX, distance, error, merged, models
from helpers.statistics import statistics
from hf_epimer import EpiMerConfig, merge_state_dicts
from hf_epimer.methods.kronecker_core import KroneckerCoreConfig
from hf_epimer.methods.tsv import TSVMConfig


def core_error(config: KroneckerCoreConfig, expected: Any, base: StateDict, **arguments: Any) -> float:
    doubled = {name: value.double() for name, value in base.items()}
    return error("kronecker-core", expected, doubled, models(base), config=config, exact=True, **arguments)


@pytest.mark.parametrize("scaffold", ["tsv-m", "iso-c"])
@pytest.mark.parametrize("metric", ["kronecker", "inputs", "task-vectors"])
@pytest.mark.parametrize("rho", [0.01, 3.0])
def test_kronecker_core_minimises_its_objective(base_state: StateDict, scaffold: str, metric: str, rho: float) -> None:
    measured = None if metric == "task-vectors" else statistics("kronecker-core", 3)
    outputs = [s[f"{MATRIX}.output_factor"] for s in measured] if measured and metric == "kronecker" else None
    inputs = [s[f"{MATRIX}.input_factor"] for s in measured] if measured else None
    if metric == "inputs" and measured:
        measured = [{n.removesuffix(".input_factor"): v for n, v in s.items() if "input" in n} for s in measured]
    weights = [0.5, 0.2, 0.3]
    expected = reference.kronecker_core(
        base_state[MATRIX], [m[MATRIX] for m in models(base_state)], outputs, inputs, weights, 6, rho, scaffold
    )
    config = KroneckerCoreConfig(rank=6, rho=rho, metric=metric, scaffold=scaffold)  # type: ignore[arg-type]
    assert core_error(config, expected, base_state, statistics=measured, weights=weights) < 1e-5


def test_kronecker_core_pulled_hard_is_its_scaffold(base_state: StateDict) -> None:
    tsv = merged("tsv-m", base_state, models(base_state), config=TSVMConfig(rank=6))
    held = merged("kronecker-core", base_state, models(base_state), config=KroneckerCoreConfig(rank=6, rho=1e7))
    free = merged("kronecker-core", base_state, models(base_state), config=KroneckerCoreConfig(rank=6, rho=0.1))
    assert distance(tsv, held, base_state) < 1e-4 < 1e-2 < distance(tsv, free, base_state)


def test_kronecker_core_on_a_complete_basis_without_labels_is_regmean() -> None:
    """Square layers, rank n / T: the basis spans all m n directions, so the core is the whole weight."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(12, 12, generator=generator, dtype=torch.float64)}
    tuned = [{"w": base["w"] + torch.randn(12, 12, generator=generator, dtype=torch.float64)} for _ in range(3)]
    inputs = []
    for _ in range(3):
        x = torch.randn(50, 12, generator=generator, dtype=torch.float64)
        gram = x.mT @ x
        inputs.append({"w": gram / gram.trace()})  # one scale for all, as the weights w_t would give them
    config = KroneckerCoreConfig(rank=4, metric="inputs", rho=1e-9)
    core = merge_state_dicts(base, tuned, method="kronecker-core", config=config, statistics=inputs, exact=True)
    expected = reference.regmean([t["w"] for t in tuned], [g["w"] for g in inputs], decay=1.0)
    assert reference.relative_error(core["w"], expected, base["w"]) < 1e-5


def test_kronecker_core_of_diagonal_curvature_is_epimers_kronecker_metric() -> None:
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
    full = KroneckerCoreConfig(rank=3, rho=1e-9)
    core = merge_state_dicts(base, tuned, method="kronecker-core", config=full, statistics=measured, exact=True)
    atoms = EpiMerConfig(preset="paper", rank=3, metric="kronecker", aggregator="mean", damping=0.0)
    epimer = merge_state_dicts(base, tuned, config=atoms, statistics=measured, exact=True)
    assert torch.allclose(core["w"], epimer["w"], atol=1e-6) and bool(core["w"].any())
