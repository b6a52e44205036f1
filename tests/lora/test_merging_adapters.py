"""Adapters merged in their core or as whole layers: what does not depend on how they are factored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.adapters import FC1, LAYER, QUERY, dense, difference, make, read, updates_of
from helpers.checkpoints import tiny_fisher, tiny_state
from hf_epimer.checkpoints.reader import Checkpoint
from hf_epimer.checkpoints.reader import StateDict as InMemory
from hf_epimer.errors import (
    StatisticsError,
    UsageError,
)
from hf_epimer.lora import Adapter, fold_updates, merge_adapters
from hf_epimer.merging.inputs import Ingredients, normalized_weights
from hf_epimer.merging.report import totals_of
from hf_epimer.merging.stream import merge_layers, stream_layers
from hf_epimer.methods import METHODS
from hf_epimer.methods.epimer import EpiMerConfig
from hf_epimer.methods.frechet_lora import FrechetLoraConfig
from hf_epimer.methods.statistic import KRONECKER, StatisticKind
from hf_epimer.methods.ties import TIESConfig
from hf_epimer.numerics.lowrank import LowRank

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_a_layer_that_an_adapter_lacks_is_zero_there(zoo: list[Adapter]) -> None:
    weights = [0.5, 0.2, 0.3]
    found = updates_of(zoo, weights=weights)
    assert list(found) == [n for n in zoo[0].shapes if any(n in adapter.changed for adapter in zoo)]
    for name, update in found.items():
        assert difference(update, sum(w * dense(a, name) for w, a in zip(weights, zoo, strict=True))) < 1e-7  # type: ignore[arg-type]
    curved = updates_of(zoo, config=FrechetLoraConfig(lora_mean="polar"), weights=weights)
    alone = LAYER + "mlp.fc2.weight"
    assert difference(curved[alone], 0.5 * dense(zoo[0], alone)) < 1e-7


@pytest.mark.parametrize("mean", ["chordal", "procrustes", "polar", "log-polar", "riemannian"])
def test_merging_does_not_depend_on_how_adapters_are_factored(mean: str, zoo: list[Adapter], base: Checkpoint) -> None:
    turned = [refactored(adapter, base, seed) for seed, adapter in enumerate(zoo)]
    config = FrechetLoraConfig(lora_mean=mean)  # type: ignore[arg-type]
    first, second = updates_of(zoo, config=config), updates_of(turned, config=config)
    assert all(difference(second[name], first[name]) < 1e-10 for name in first)


def refactored(adapter: Adapter, base: Checkpoint, seed: int) -> Adapter:
    """(B G, G^{-1} A) with the scaling inside."""
    generator = torch.Generator().manual_seed(seed)
    stored, ranks = {}, {}
    for name in adapter.changed:
        b, a = adapter.factors(name)
        g = torch.randn(len(a), len(a), generator=generator, dtype=torch.float64)
        module = name.removesuffix(".weight")
        stored[f"base_model.model.{module}.lora_A.weight"] = torch.linalg.solve(g, a)
        stored[f"base_model.model.{module}.lora_B.weight"] = b @ g
        ranks[module] = len(a)
    config = {"peft_type": "LORA", "rank_pattern": ranks, "alpha_pattern": ranks}
    return Adapter(adapter.label, config, InMemory(adapter.label, stored), base)


@pytest.mark.parametrize("method", ["mean", "task-arithmetic", "tsv-m"])
def test_methods_give_in_the_core_what_they_give_on_whole_layers(
    method: str, zoo: list[Adapter], base: Checkpoint
) -> None:
    config = METHODS[method].config()
    ingredients = Ingredients(base, zoo, normalized_weights(None, 3))
    whole = {
        m.name: m.tensor for m in merge_layers(ingredients, METHODS[method], config, exact=True, dtype=torch.float64)
    }
    found = updates_of(zoo, method)
    for name in base.shapes:
        if name in found:
            assert difference(found[name], whole[name] - base.tensor(name).double()) < 1e-5
        else:
            assert torch.equal(whole[name].float(), base.tensor(name))


@pytest.mark.parametrize(
    ("method", "options", "measured"),
    [
        ("epimer-core", {}, "all"),
        ("epimer-core", {}, "some"),
        ("epimer-core", {}, "none"),
        ("epimer-core", {"cap": 1.0}, "all"),
        ("regmean", {}, "all"),
    ],
)
def test_metrics_of_the_inputs_give_in_the_core_of_the_outputs_what_they_give_on_whole_layers(
    method: str, options: dict[str, Any], measured: str, zoo: list[Adapter], base: Checkpoint
) -> None:
    needed = METHODS[method].needs
    assert needed is not None
    known: list[Any] = [second_moments(base, seed, needed) for seed in range(3)]
    if measured == "some":
        known[1] = InMemory("nothing", {})
    statistics = None if measured == "none" else known
    config = METHODS[method].config(**options)
    ingredients = Ingredients(base, zoo, [0.2, 0.3, 0.5], statistics)
    whole = {
        m.name: m.tensor for m in merge_layers(ingredients, METHODS[method], config, exact=True, dtype=torch.float64)
    }
    found = updates_of(zoo, method, config, weights=[0.2, 0.3, 0.5], statistics=statistics, exact=True)
    assert found
    for name, update in found.items():
        assert difference(update, whole[name] - base.tensor(name).double()) < 1e-5, name


@pytest.mark.parametrize("mean", ["chordal", "procrustes", "polar", "riemannian"])
def test_means_of_dense_task_vectors_are_those_of_their_factors(
    mean: str, zoo: list[Adapter], base: Checkpoint
) -> None:
    """Streamed beside full checkpoints an adapter is a float32 task vector; its rank is found again."""
    config = FrechetLoraConfig(lora_mean=mean)  # type: ignore[arg-type]
    found, seen = updates_of(zoo, config=config), {}

    def merge(layer: Any) -> None:
        if layer.name in found:
            seen[layer.name] = METHODS["frechet-lora"].merge(layer, config, None).task_vector.clone()

    list(stream_layers(Ingredients(base, zoo, normalized_weights(None, 3)), merge))
    assert seen.keys() == found.keys()
    assert all(difference(seen[name], found[name]) < 1e-3 for name in found)


def test_iso_in_the_core_has_the_scale_of_the_core(zoo: list[Adapter], base: Checkpoint) -> None:
    """Most of min(m, n) directions are empty for adapters: the mean singular value is over those of the core."""
    ingredients = Ingredients(base, zoo, normalized_weights(None, 3))
    config = METHODS["iso-c"].config()
    whole = {
        m.name: m.tensor for m in merge_layers(ingredients, METHODS["iso-c"], config, exact=True, dtype=torch.float64)
    }
    found = updates_of(zoo, "iso-c")[FC1]
    expected = (whole[FC1] - base.tensor(FC1).double()) * min(base.shapes[FC1]) / 12
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"regmean"}))
def test_every_method_merges_adapters(method: str, zoo: list[Adapter]) -> None:
    statistics = [InMemory(f"{t}", tiny_fisher(t)) for t in range(3)] if METHODS[method].needs else None
    config = METHODS[method].config()
    found = updates_of(zoo, method, config, statistics=statistics)
    assert all(bool(update.isfinite().all()) for update in found.values())
    order = [2, 0, 1]
    again = updates_of(
        [zoo[t] for t in order], method, config, statistics=statistics and [statistics[t] for t in order]
    )
    assert all(difference(again[name], found[name]) < 1e-3 for name in found)


def second_moments(base: Checkpoint, seed: int, kind: StatisticKind = KRONECKER) -> InMemory:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for stored, (size, _) in kind.shapes({n: shape for n, shape in base.shapes.items() if len(shape) == 2}).items():
        x = torch.randn(50, size, generator=generator) * torch.logspace(0, -2, size)
        tensors[stored] = x.mT @ x / 50
    return InMemory(f"curvature {seed}", tensors)


def test_kronecker_curvature_in_the_core(zoo: list[Adapter], base: Checkpoint) -> None:
    """The merged update minimises the curved loss over the core: no multiple of the mean beats it."""
    curvature = [second_moments(base, t) for t in range(3)]

    def loss(update: Tensor, name: str) -> float:
        total = 0.0
        for adapter, statistics in zip(zoo, curvature, strict=True):
            a, s = (statistics.tensor(name + part.suffix).double() for part in KRONECKER.parts)
            d = update - dense(adapter, name)
            total += float(((s @ d @ a) * d).sum())
        return total

    for normalize in ("none", "trace"):
        config = FrechetLoraConfig(metric="kronecker", normalize=normalize)  # type: ignore[arg-type]
        found = updates_of(zoo, config=config, statistics=curvature)
        flat = updates_of(zoo)
        if normalize == "none":
            assert all(
                loss(found[n], n) < min(loss(c * flat[n], n) for c in (0.5, 0.9, 1.0, 1.1)) for n in (QUERY, FC1)
            )
    with pytest.raises(StatisticsError, match="kronecker"):
        updates_of(zoo, config=FrechetLoraConfig(metric="kronecker"))


def test_epimer_under_kronecker_curvature_is_the_same_in_the_core(zoo: list[Adapter], base: Checkpoint) -> None:
    curvature = [second_moments(base, t) for t in range(3)]
    config = EpiMerConfig(rank=6, metric="kronecker")
    ingredients = Ingredients(base, zoo, normalized_weights(None, 3), curvature)
    whole = {
        m.name: m.tensor for m in merge_layers(ingredients, METHODS["epimer"], config, exact=True, dtype=torch.float64)
    }
    found = updates_of(zoo, "epimer", config, statistics=curvature)
    for name in (QUERY, FC1):
        assert difference(found[name], whole[name] - base.tensor(name).double()) < 1e-4


def test_knots_style_ties_does_not_depend_on_factors_either(zoo: list[Adapter], base: Checkpoint) -> None:
    turned = [refactored(adapter, base, seed) for seed, adapter in enumerate(zoo)]
    config = TIESConfig(density=0.5)
    first, second = updates_of(zoo, "ties", config), updates_of(turned, "ties", config)
    assert all(difference(second[name], first[name]) < 1e-6 for name in first)


def test_out_rank_cuts_and_says_what_was_lost(zoo: list[Adapter]) -> None:
    config = FrechetLoraConfig()
    for out_rank, expected in ((None, 9), (2, 2), (100, 9)):
        merged = {u.name: u for u in merge_adapters(zoo, METHODS["frechet-lora"], config, out_rank=out_rank)}
        update = merged[QUERY].update
        assert isinstance(update, LowRank)
        assert update.rank == expected == merged[QUERY].report.adapter.out_rank
        assert (merged[QUERY].report.adapter.cut_off > 0.01) == (out_rank == 2)
        assert merged[QUERY].report.adapter.ranks == (4, 2, 3)
    with pytest.raises(UsageError, match="--out-rank"):
        updates_of(zoo, out_rank=0)


def test_alpha_scales_everything(base_folder: Path, base: Checkpoint) -> None:
    adapters = [read(make(base_folder, n, i, bias="all"), base) for i, n in enumerate("ab")]
    for mean in ("chordal", "polar"):
        one, two = (updates_of(adapters, config=FrechetLoraConfig(lora_mean=mean, alpha=a)) for a in (1.0, -2.0))  # type: ignore[arg-type]
        assert any(len(shape.shape) == 1 for shape in one.values())
        assert all(torch.allclose(two[name], -2 * one[name]) for name in one)


def test_distance_is_reported(zoo: list[Adapter]) -> None:
    config = FrechetLoraConfig(lora_mean="procrustes")
    reports = {u.name: u.report for u in merge_adapters(zoo, METHODS["frechet-lora"], config)}
    solve = reports[QUERY].solve
    assert solve and solve.angle > 0.8 and solve.unique is False
    assert "degrees apart" in solve.note
    said = totals_of(list(reports.values()))["note"]
    assert re.match(r"in \d+ of 8 layers .*principal angles up to \d\d degrees.*local mean", said)
    near = [u.report for u in merge_adapters(zoo, METHODS["frechet-lora"], FrechetLoraConfig())]
    assert "note" not in totals_of(near)


def test_a_full_model_from_adapters(zoo: list[Adapter], base: Checkpoint) -> None:
    merged = list(fold_updates(merge_adapters(zoo, METHODS["frechet-lora"], FrechetLoraConfig()), base))
    assert [layer.name for layer in merged] == list(base.shapes)
    for layer in merged:
        added = sum(dense(adapter, layer.name) for adapter in zoo).float() / 3  # type: ignore[union-attr]
        assert torch.allclose(layer.tensor, base.tensor(layer.name) + added, atol=1e-6)


def test_adapters_and_full_checkpoints_mix_as_task_vectors(zoo: list[Adapter], base: Checkpoint) -> None:
    full = InMemory("full", tiny_state(5, tiny_state(0)))
    for method in ("mean", "tsv-m", "frechet-lora"):
        ingredients = Ingredients(base, [zoo[0], full], [0.5, 0.5])
        merged = {m.name: m.tensor for m in merge_layers(ingredients, METHODS[method], METHODS[method].config())}
        assert merged.keys() == base.shapes.keys()
        if method == "mean":
            assert torch.allclose(merged[FC1], (zoo[0].tensor(FC1) + full.tensor(FC1)) / 2, atol=1e-6)


def test_a_streamed_adapter_has_exactly_its_rank(base_folder: Path, base: Checkpoint) -> None:
    """Through base + B A - base a weak adapter on large weights drowns in rounding; it is read as a task vector."""
    folder = make(base_folder, "a", 1, r=2)
    file = folder / "adapter_model.safetensors"
    save_file({key: value * 1e-3 for key, value in load_file(file).items()}, file)
    large = InMemory("base", {name: 1e3 * base.tensor(name) for name in base.shapes})
    adapter = read(folder, large)  # type: ignore[arg-type]
    seen = {}

    def look(layer: Any) -> None:
        seen[layer.name] = layer.task_vectors[0].clone()  # its buffer is used again

    list(stream_layers(Ingredients(large, [adapter], [1.0]), look))
    assert int(torch.linalg.matrix_rank(seen[FC1])) == 2
    assert difference(seen[FC1], dense(adapter, FC1)) < 1e-6
