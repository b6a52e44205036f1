"""EpiMer in closed form on whole layers: its objective, its limits, its spikes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import reference
from helpers.checkpoints import StateDict
from helpers.merges import MATRIX, distance, error, merged, models
from helpers.statistics import statistics
from hf_epimer import merge_state_dicts
from hf_epimer.methods.epimer_core import UNHEARD, EpiMerCoreConfig
from hf_epimer.methods.regmean import RegMeanConfig
from hf_epimer.methods.wudi import WUDIConfig
from hf_epimer.numerics.input_metric import agreed_sum
from hf_epimer.numerics.spikes import without_spikes

NEVER = 1e9
"""A cap that cuts nothing."""


def closed_form_error(config: EpiMerCoreConfig, expected: Any, base: StateDict, **arguments: Any) -> float:
    doubled = {name: value.double() for name, value in base.items()}
    return error("epimer-core", expected, doubled, models(base), config=config, exact=True, **arguments)


@pytest.mark.parametrize("metric", ["curvature+task-vectors", "curvature", "task-vectors"])
@pytest.mark.parametrize(("rho", "mixture"), [(0.1, 1.0), (3.0, 0.3)])
def test_epimer_core_minimises_its_objective(base_state: StateDict, metric: Any, rho: float, mixture: float) -> None:
    measured = statistics("epimer-core", 3)
    assert measured is not None
    weights, key = [0.5, 0.2, 0.3], f"{MATRIX}.gradient_gram"
    grams = [None if metric == "task-vectors" else entry[key] for entry in measured]
    config = EpiMerCoreConfig(metric=metric, rho=rho, mixture=mixture, cap=NEVER)
    tuned = [model[MATRIX] for model in models(base_state)]
    expected = reference.epimer_core(base_state[MATRIX], tuned, grams, weights, rho, mixture, metric == "curvature")
    assert closed_form_error(config, expected, base_state, statistics=measured, weights=weights) < 1e-6
    # float32, as it is merged
    found = merged("epimer-core", base_state, models(base_state), config=config, statistics=measured, weights=weights)
    assert reference.relative_error(found[MATRIX], expected, base_state[MATRIX]) < 1e-4


def test_epimer_core_goes_by_the_task_vectors_of_tasks_without_data(base_state: StateDict) -> None:
    measured = statistics("epimer-core", 3)
    assert measured is not None
    measured[1] = {}
    grams = [entry.get(f"{MATRIX}.gradient_gram") for entry in measured]
    tuned = [model[MATRIX] for model in models(base_state)]
    expected = reference.epimer_core(base_state[MATRIX], tuned, grams, [1 / 3] * 3, 0.1)
    assert closed_form_error(EpiMerCoreConfig(cap=NEVER), expected, base_state, statistics=measured) < 1e-6
    data_free = merged("epimer-core", base_state, models(base_state), config=EpiMerCoreConfig(metric="task-vectors"))
    for nothing in (None, [{}, {}, {}]):
        found = merged("epimer-core", base_state, models(base_state), statistics=nothing)
        assert distance(data_free, found, base_state) < 1e-6


def test_epimer_core_held_fast_is_its_start(base_state: StateDict) -> None:
    tuned = models(base_state)
    free = merged("epimer-core", base_state, tuned, config=EpiMerCoreConfig(start="tsv-m", cap=NEVER))
    held = merged("epimer-core", base_state, tuned, config=EpiMerCoreConfig(start="tsv-m", rho=1e6, cap=NEVER))
    tsv = merged("tsv-m", base_state, tuned)
    assert distance(tsv, held, base_state) < 1e-4 < 1e-2 < distance(tsv, free, base_state)
    held = merged("epimer-core", base_state, tuned, config=EpiMerCoreConfig(rho=1e6, cap=NEVER))
    deltas = torch.stack([model[MATRIX] - base_state[MATRIX] for model in tuned])
    length = deltas.square().sum() / 3 / deltas.mean(0).square().sum()
    expected = base_state[MATRIX] + length * deltas.mean(0)
    assert reference.relative_error(held[MATRIX], expected, base_state[MATRIX]) < 1e-4


def test_epimer_core_by_curvature_alone_and_without_an_anchor_is_regmean(base_state: StateDict) -> None:
    base = {name: value.double() for name, value in base_state.items()}
    measured = statistics("regmean", 3)
    assert measured is not None
    scaled = []
    for entry, model in zip(measured, models(base_state), strict=True):
        delta = model[MATRIX].double() - base[MATRIX]
        scaled.append({MATRIX: reference.unit_along(entry[MATRIX].double(), delta)})
    weighted = [{f"{n}.gradient_gram": g for n, g in entry.items()} for entry in measured]
    free = EpiMerCoreConfig(metric="curvature", rho=1e-9, cap=NEVER)
    core = merged("epimer-core", base, models(base_state), statistics=weighted, config=free, exact=True)
    plain = RegMeanConfig(decay=1.0, damping=0.0)
    expected = merged("regmean", base, models(base_state), statistics=scaled, config=plain, exact=True)
    assert reference.relative_error(core[MATRIX], expected[MATRIX], base[MATRIX]) < 1e-6


def test_epimer_core_by_task_vectors_at_right_angles_is_wudi() -> None:
    """Then the start, the sum as far as task vectors agree, is WUDI's: the sum. Equal spectra scale metrics alike."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(6, 9, dtype=torch.float64)}
    tuned = []
    for task in range(3):
        delta = torch.zeros(6, 9, dtype=torch.float64)
        right = torch.linalg.qr(torch.randn(9, 2, generator=generator, dtype=torch.float64))[0]
        delta[2 * task : 2 * task + 2] = torch.tensor([[3.0], [1.0]]) * right.mT
        tuned.append({"w": delta})
    for rho in (0.1, 2.0):
        config = EpiMerCoreConfig(metric="task-vectors", rho=rho, cap=NEVER)
        core = merge_state_dicts(base, tuned, "epimer-core", config, exact=True)
        wudi = merge_state_dicts(base, tuned, "wudi", WUDIConfig(damping=rho), exact=True)
        assert torch.allclose(core["w"], wudi["w"], atol=1e-9)


@pytest.mark.parametrize("start", ["sum", "tsv-m"])
@pytest.mark.parametrize("metric", ["curvature+task-vectors", "curvature", "task-vectors"])
def test_epimer_core_returns_a_model_merged_with_itself(base_state: StateDict, start: Any, metric: Any) -> None:
    model = models(base_state, 1)[0]
    config = EpiMerCoreConfig(start=start, metric=metric)
    alone = merged("epimer-core", base_state, [model], statistics=statistics("epimer-core", 1), config=config)
    assert distance(model, alone, base_state) < 1e-5
    if start == "sum":  # of TSV-M as many directions survive as min(m, n) / T
        found = merged("epimer-core", base_state, [model] * 3, config=config)
        assert distance(model, found, base_state) < 1e-5


def test_epimer_core_cuts_a_spike_and_nothing_else(base_state: StateDict) -> None:
    """One task with a leading direction five times the others': its merge is that of the task without the spike."""
    only, tuned = {MATRIX: base_state[MATRIX].double()}, [{MATRIX: m[MATRIX].double()} for m in models(base_state)]
    deltas = torch.stack([model[MATRIX] - only[MATRIX] for model in tuned])
    u, s, vh = torch.linalg.svd(deltas[1])
    spiked = [dict(model) for model in tuned]
    spiked[1][MATRIX] = tuned[1][MATRIX] + 5 * s[0] * torch.outer(u[:, 0], vh[0])
    cut, gone = without_spikes(torch.stack([model[MATRIX] - only[MATRIX] for model in spiked]), 1.2)
    assert torch.equal(cut[[0, 2]], deltas[[0, 2]]) and not gone[[0, 2]].any() and float(gone[1]) > 0.5
    shapes = torch.linalg.svdvals(torch.stack([model[MATRIX] - only[MATRIX] for model in spiked]))
    shapes = shapes / shapes.norm(dim=1, keepdim=True)
    own = torch.linalg.svdvals(cut[1])
    length = (spiked[1][MATRIX] - only[MATRIX]).norm()
    assert float(own[0]) == pytest.approx(1.2 * float(shapes[:, 0].median() * length), rel=1e-6)
    config = EpiMerCoreConfig(metric="task-vectors")
    found = merge_state_dicts(only, spiked, "epimer-core", config, exact=True)
    by_hand = [{MATRIX: only[MATRIX] + delta} for delta in cut]
    expected = merge_state_dicts(only, by_hand, "epimer-core", replace(config, cap=NEVER), exact=True)
    assert torch.allclose(found[MATRIX], expected[MATRIX], atol=1e-9)


def test_of_two_tasks_the_one_with_the_spike_is_cut_to_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    plain, spiked = torch.randn(2, 20, 30, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(spiked)
    spiked = spiked + 5 * s[0] * torch.outer(u[:, 0], vh[0])
    cut, gone = without_spikes(torch.stack([plain, 10 * spiked]), 1.2)
    assert torch.equal(cut[0], plain) and not gone[0] and float(gone[1]) > 0.5
    limit = 1.2 * torch.linalg.svdvals(plain)[0] / plain.norm() * (10 * spiked).norm()
    assert float(torch.linalg.svdvals(cut[1])[0]) == pytest.approx(float(limit), rel=1e-6)


@pytest.mark.parametrize(("spike", "heard"), [(0.0, 1.0), (0.4, 0.6), (5.0, 0.0)])
def test_curvature_of_a_task_that_stands_out_is_heard_less(base_state: StateDict, spike: float, heard: float) -> None:
    """As far as its task vector was cut: the merge is that of the cut task vectors with so much of its curvature."""
    measured = statistics("epimer-core", 3)
    assert measured is not None
    key = f"{MATRIX}.gradient_gram"
    only = {MATRIX: base_state[MATRIX].double()}
    deltas = torch.stack([model[MATRIX].double() - only[MATRIX] for model in models(base_state)])
    u, s, vh = torch.linalg.svd(deltas[1])
    deltas[1] += spike * s[0] * torch.outer(u[:, 0], vh[0])
    cut, gone = without_spikes(deltas, 1.2)
    assert max(0.0, 1 - float(gone[1]) / UNHEARD) == pytest.approx(heard, abs=0.01)
    config = EpiMerCoreConfig()
    given = [{key: entry[key].double()} for entry in measured]
    spiked = [{MATRIX: only[MATRIX] + delta} for delta in deltas]
    found = merge_state_dicts(only, spiked, "epimer-core", config, statistics=given, exact=True)
    system, right = torch.zeros_like(given[0][key]), torch.zeros_like(cut[0])
    start = agreed_sum(cut, torch.full((3,), 1 / 3, dtype=torch.float64))
    for task, believed in enumerate([1.0, max(0.0, 1 - float(gone[1]) / UNHEARD), 1.0]):
        metric = believed * reference.unit_mean(given[task][key]) + reference.unit_mean(cut[task].mT @ cut[task])
        metric = reference.unit_along(metric, cut[task])
        system += metric / 3
        right += (cut[task] - start) @ metric / 3
    system.diagonal().add_(config.rho * system.diagonal().mean())
    expected = only[MATRIX] + start + torch.linalg.solve(system, right, left=False)
    assert reference.relative_error(found[MATRIX], expected, only[MATRIX]) < 1e-6


def test_the_agreed_sum_goes_as_far_along_task_vectors_as_they_go() -> None:
    generator = torch.Generator().manual_seed(0)
    deltas, weights = torch.randn(3, 4, 5, generator=generator), torch.tensor([0.5, 0.3, 0.2])
    along = torch.stack([(agreed_sum(deltas, weights) * delta).sum() for delta in deltas])
    assert float(weights @ along) == pytest.approx(float(weights @ deltas.square().sum((1, 2))), rel=1e-5)
    one = deltas[:1].expand(2, 4, 5)
    halves = torch.tensor([0.5, 0.5])
    assert torch.allclose(agreed_sum(one, halves), one[0])
    apart = torch.zeros(2, 4, 5)
    apart[0, :2], apart[1, 2:] = deltas[0, :2], deltas[0, 2:]
    assert torch.allclose(agreed_sum(apart, halves), deltas[0])
    opposite = torch.stack([deltas[0], -0.9 * deltas[0]])
    assert torch.allclose(agreed_sum(opposite, halves), 0.1 * deltas[0], atol=1e-6)
    assert not agreed_sum(torch.stack([deltas[0], -deltas[0]]), halves).any()
