"""TIES' threshold of a whole model is exact, whatever a first look at few entries has said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_epimer.numerics.trimming import STEP, elect_and_average, model_thresholds


class Passes:
    """Layers, T x ... each; counts how often all of their entries are read."""

    def __init__(self, layers: list[Tensor]) -> None:
        self.layers, self.count = layers, 0

    def __call__(self, work: Callable[[Tensor], Any], step: int) -> Iterator[Any]:
        self.count += step == 1
        return (work(layer.flatten(1)[:, ::step]) for layer in self.layers)


def sorted_out(layers: list[Tensor], density: float) -> Tensor:
    magnitudes = torch.cat([layer.flatten(1) for layer in layers], 1).float().abs()
    kept = max(1, round(density * magnitudes.shape[1]))
    return magnitudes.sort(1, descending=True).values[:, kept - 1]


def drawn() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [1e-3 * torch.randn(3, *shape, generator=generator) for shape in ((700, 900), (300,), (2, 3, 500))]


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5])
def test_one_pass_finds_the_exact_threshold(density: float) -> None:
    passes = Passes(drawn())
    assert torch.equal(model_thresholds(passes, density), sorted_out(passes.layers, density))
    assert passes.count == 1


@pytest.mark.parametrize("density", [1e-9, 0.9, 1.0])
def test_extreme_densities(density: float) -> None:
    passes = Passes(drawn())
    assert torch.equal(model_thresholds(passes, density), sorted_out(passes.layers, density))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e3])
def test_entries_that_mislead_cost_passes_and_no_exactness(scale: float) -> None:
    passes = Passes([layer.flatten(1) for layer in drawn()])
    for layer in passes.layers:
        layer[:, ::STEP] *= scale
    assert torch.equal(model_thresholds(passes, 0.2), sorted_out(passes.layers, 0.2))
    assert passes.count == 3


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_values_with_ties_zeros_and_extremes(data: st.DataObject) -> None:
    few = data.draw(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=4))
    count = data.draw(st.integers(1, 100))
    values = data.draw(st.lists(st.sampled_from([*few, 0.0, -0.0]), min_size=2 * count, max_size=2 * count))
    layer = torch.tensor(values).view(2, count)
    density = data.draw(st.floats(0.01, 1.0))
    assert torch.equal(model_thresholds(Passes([layer]), density), sorted_out([layer], density))


def test_half_precision_and_zeros_alone() -> None:
    layers = [layer.bfloat16() for layer in drawn()]
    assert torch.equal(model_thresholds(Passes(layers), 0.2), sorted_out(layers, 0.2))
    assert model_thresholds(Passes([torch.zeros(3, 50), torch.ones(3, 0)]), 0.2).tolist() == [0.0] * 3


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, weights = drawn()[1], torch.tensor([0.5, 0.3, 0.2])
    threshold = sorted_out([layer], 0.3)
    whole = elect_and_average(layer, weights, "mass", threshold)
    monkeypatch.setattr("hf_epimer.numerics.trimming.BLOCK", 64)
    torch.testing.assert_close(elect_and_average(layer, weights, "mass", threshold), whole)
    assert torch.equal(model_thresholds(Passes([layer]), 0.3), threshold)
