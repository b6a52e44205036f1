"""Layers solved on a stand-in for a GPU: to the bits of the CPU, which solves them with one worker as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.accelerator import DEVICE, StandIn, solve_here
from helpers.checkpoints import StateDict
from helpers.merges import MATRIX, merged, models
from hf_epimer import METHODS, EpiMerConfig, merge_state_dicts
from hf_epimer.numerics.subspace import tagged_basis


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    solve_here(monkeypatch)


def equal(one: StateDict, other: StateDict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_all_tensors_where_the_layer_is(method: str, base_state: StateDict) -> None:
    tuned = models(base_state)
    wanted = merged(method, base_state, tuned)
    with StandIn() as device:
        found = merged(method, base_state, tuned, device=DEVICE.type)
    assert device.sent > sum(value.numel() for state in tuned for value in state.values())
    assert equal(found, wanted)


def test_a_basis_that_statistics_were_taken_in_goes_where_the_layer_is(base_state: StateDict) -> None:
    tuned = models(base_state)
    base, own = {MATRIX: base_state[MATRIX]}, [{MATRIX: state[MATRIX]} for state in tuned]
    basis = tagged_basis(torch.stack([state[MATRIX] - base[MATRIX] for state in own]), 4)
    assert basis is not None
    metrics = [torch.diag(torch.rand(basis.size, generator=torch.Generator().manual_seed(n))) for n in range(3)]
    given: dict[str, Any] = {
        "config": EpiMerConfig(metric="projected", rank=4),
        "statistics": [{MATRIX: metric, f"{MATRIX}.shrinkage": torch.zeros(1)} for metric in metrics],
        "bases": {MATRIX: basis},
    }
    wanted = merge_state_dicts(base, own, **given)
    with StandIn():
        found = merge_state_dicts(base, own, device=DEVICE.type, **given)
    assert equal(found, wanted)


def test_layers_are_solved_on_the_cpu_where_a_device_has_no_float64(base_state: StateDict) -> None:
    """RegMean is of those that compute in it."""
    tuned = models(base_state)
    assert equal(merged("regmean", base_state, tuned, device="mps"), merged("regmean", base_state, tuned))
