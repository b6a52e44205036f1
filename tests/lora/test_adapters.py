"""Adapters on disk: made by PEFT, read, merged in the core or as whole layers, written, and loaded by PEFT again."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.adapters import FC1, LAYER, QUERY, folded, make, rewrite_config, rewrite_weights
from helpers.checkpoints import TINY, StateDict, tiny_fisher, tiny_state
from hf_epimer.checkpoints.reader import Checkpoint, TaskVectorSource
from hf_epimer.checkpoints.reader import StateDict as InMemory
from hf_epimer.errors import (
    CheckpointError,
    EpimerError,
    MismatchError,
    NumericalError,
    OutputError,
    StatisticsError,
    UsageError,
)
from hf_epimer.lora import Adapter, adapter_of, is_adapter, merge_adapters, read_adapter, write_adapter
from hf_epimer.lora.adapter import adapter_weights
from hf_epimer.merging.inputs import Ingredients, normalized_weights
from hf_epimer.merging.report import totals_of
from hf_epimer.merging.stream import merge_layers, stream_layers
from hf_epimer.methods import METHODS
from hf_epimer.methods.epimer import EpiMerConfig
from hf_epimer.methods.frechet_lora import FrechetLoraConfig
from hf_epimer.methods.statistic import KRONECKER
from hf_epimer.methods.ties import TIESConfig
from hf_epimer.models.clip import CLIP
from hf_epimer.numerics.lowrank import LowRank

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

NEWEST = {"module_name": CLIP.module_name, "model_class": (CLIP.output_class, CLIP.library)}


def read(folder: Path, base: Checkpoint) -> Adapter:
    return read_adapter(folder, base, CLIP.canonical)


def dense(adapter: Adapter, name: str) -> Tensor:
    out = torch.empty(adapter.shapes[name], dtype=torch.float64)
    adapter.task_vector_to(name, out)
    return out


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "r": 3,
        "rank_pattern": {"layers.0.mlp.fc1": 2, "q_proj": 5},
        "alpha_pattern": {"^encoder.layers.1.*": 9, "fc2": 1},
        "use_rslora": True,
    },
    "half": {"r": 2, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*layers\.0\.mlp\.fc[12]"},
    "biases": {"bias": "lora_only"},
    "all biases": {"bias": "all", "target_modules": ["fc1"]},
    "lora bias": {"lora_bias": True},
    "modules": {"modules_to_save": ["post_layernorm", "layer_norm1"], "target_modules": ["q_proj"]},
    "embeddings": {"target_modules": ["patch_embedding", "position_embedding", "fc2"]},
    "pissa-free gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_read_as_peft_reads_it(kind: str, base_folder: Path, base: Checkpoint) -> None:
    folder = make(base_folder, "a", 1, **KINDS[kind])
    adapter, expected = read(folder, base), folded(folder, base_folder)
    assert isinstance(adapter, TaskVectorSource)
    assert adapter.shapes.keys() == expected.keys()
    for name in base.shapes:
        assert torch.allclose(adapter.tensor(name), expected[name], atol=1e-6)
        copied = torch.empty(base.shapes[name])
        adapter.copy_to(name, copied)
        assert torch.allclose(copied, expected[name], atol=1e-6)
        if name in adapter.changed and len(base.shapes[name]) > 1:
            folded_back = adapter.low_rank(name).dense().view(base.shapes[name])
            assert torch.allclose(folded_back, dense(adapter, name), atol=1e-6)
        elif name not in adapter.changed:
            assert torch.equal(adapter.tensor(name), base.tensor(name))


def test_fan_in_fan_out_changes_nothing_for_linear_layers(base_folder: Path, base: Checkpoint) -> None:
    folder = make(base_folder, "a", 1)
    expected = folded(folder, base_folder)
    rewrite_config(folder, fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        again = folded(folder, base_folder)
    assert torch.equal(again[QUERY], expected[QUERY])
    assert torch.allclose(read(folder, base).tensor(QUERY), expected[QUERY], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_in_half_precision(dtype: torch.dtype, base_folder: Path, base: Checkpoint) -> None:
    folder = make(base_folder, "a", 1)
    rewrite_weights(folder, lambda s: s.update({key: value.to(dtype) for key, value in s.items()}))
    adapter = read(folder, base)
    found = updates_of([adapter], config=FrechetLoraConfig(lora_mean="procrustes"))
    b, a = adapter.factors(QUERY)
    stored = load_file(folder / "adapter_model.safetensors")[f"base_model.model.{QUERY[13:-7]}.lora_A.weight"]
    assert stored.dtype == dtype and torch.equal(a, stored.double())
    assert difference(found[QUERY], b @ a) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_merged_and_written_is_that_adapter(kind: str, base_folder: Path, base: Checkpoint) -> None:
    adapter = read(make(base_folder, "a", 1, **KINDS[kind]), base)
    out = base_folder.parent / "out"
    out.mkdir()
    for mean in ("chordal", "procrustes"):
        updates = merge_adapters([adapter], METHODS["frechet-lora"], FrechetLoraConfig(lora_mean=mean))  # type: ignore[arg-type]
        write_adapter(out, updates, base, **NEWEST, base_name="org/base")
        found = folded(out, base_folder)
        assert all(torch.allclose(found[name], adapter.tensor(name), atol=1e-6) for name in base.shapes)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert peft.LoraConfig.from_pretrained(out).peft_type == "LORA"


@pytest.mark.parametrize("prefix", ["vision_model.", "clip.vision_model.", "model.vision_model."])
def test_older_key_layouts_give_the_same_adapter(prefix: str, base_folder: Path, base: Checkpoint) -> None:
    """transformers 4 and full CLIP models put the tower below a prefix; patterns match the end of a module's name."""
    folder = make(base_folder, "a", 1, r=3, rank_pattern={"layers.0.mlp.fc1": 2}, modules_to_save=["post_layernorm"])
    new = read(folder, base)
    file = folder / "adapter_model.safetensors"
    root = "base_model.model."
    save_file({root + prefix + key.removeprefix(root): value for key, value in load_file(file).items()}, file)
    old = read(folder, base)
    assert old.changed == new.changed
    assert all(torch.equal(old.tensor(name), new.tensor(name)) for name in base.shapes)


def test_a_prefixed_adapter_loads_into_models_that_have_the_prefix(base_folder: Path, base: Checkpoint) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    adapters = [
        read(make(base_folder, name, i, modules_to_save=["post_layernorm"]), base) for i, name in enumerate("ab")
    ]
    out = base_folder.parent / "out"
    out.mkdir()
    updates = list(merge_adapters(adapters, METHODS["mean"], METHODS["mean"].config()))
    write_adapter(out, updates, base, module_name=lambda name: name, model_class=NEWEST["model_class"])
    config = CLIPVisionConfig(**TINY, projection_dim=24)  # type: ignore[arg-type]
    model = CLIPVisionModelWithProjection(config)
    model.load_state_dict({name: base.tensor(name) for name in base.shapes}, strict=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        found = peft.PeftModel.from_pretrained(model, out).merge_and_unload().state_dict()
    expected = adapter_of(updates, base)
    assert all(torch.allclose(found[name], expected.tensor(name), atol=1e-6) for name in base.shapes)


# --- merging ---


@pytest.fixture
def zoo(base_folder: Path, base: Checkpoint) -> list[Adapter]:
    """Three adapters of unlike ranks and targets: no layer is in all of them, fc2 is in one."""
    settings: list[dict[str, Any]] = [
        {"r": 4, "target_modules": ["q_proj", "fc1", "fc2"]},
        {"r": 2, "target_modules": ["q_proj", "fc1"], "use_rslora": True},
        {"r": 3, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 6}},
    ]
    return [read(make(base_folder, name, seed, **s), base) for seed, (name, s) in enumerate(zip("abc", settings))]


def updates_of(adapters: list[Adapter], method: str = "frechet-lora", config: Any = None, **more: Any) -> StateDict:
    config = config or METHODS[method].config()
    found = merge_adapters(adapters, METHODS[method], config, **more)
    return {
        u.name: u.update.dense().view(u.shape) if isinstance(u.update, LowRank) else u.update.double() for u in found
    }


def difference(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-12))  # DARE may drop everything


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


def kronecker(base: Checkpoint, seed: int) -> InMemory:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in base.shapes.items():
        if len(shape) == 2:
            for part, size in zip(KRONECKER.parts, (shape[1], shape[0]), strict=True):
                x = torch.randn(50, size, generator=generator) * torch.logspace(0, -2, size)
                tensors[name + part.suffix] = x.mT @ x / 50
    return InMemory(f"curvature {seed}", tensors)


def test_kronecker_curvature_in_the_core(zoo: list[Adapter], base: Checkpoint) -> None:
    """The merged update minimises the curved loss over the core: no multiple of the mean beats it."""
    curvature = [kronecker(base, t) for t in range(3)]

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
    curvature = [kronecker(base, t) for t in range(3)]
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
    merged = adapter_of(merge_adapters(zoo, METHODS["frechet-lora"], FrechetLoraConfig()), base)
    for name in base.shapes:
        expected = base.tensor(name) + sum(dense(adapter, name) for adapter in zoo).float() / 3  # type: ignore[union-attr]
        assert torch.allclose(merged.tensor(name), expected, atol=1e-6)
    again = adapter_of(merge_adapters([merged], METHODS["frechet-lora"], FrechetLoraConfig()), base)
    assert torch.allclose(again.tensor(QUERY), merged.tensor(QUERY), atol=1e-6)


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


# --- what is refused ---


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"use_dora": True}, "a: use_dora.*DoRA rescales.*merge_and_unload"),
        ({"peft_type": "IA3"}, "a: it is a IA3 adapter; only LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "a: it started from pissa_niter_4.*plain LoRA"),
        ({"layer_replication": [[0, 1]]}, "a: layer_replication"),
        ({"r": 5}, "has factors of rank 4, but adapter_config.json says 5"),
        ({"lora_alpha": "x"}, "lora_alpha in adapter_config.json is 'x'"),
    ],
)
def test_kinds_that_are_no_low_rank_update(
    entries: dict[str, Any], message: str, base_folder: Path, base: Checkpoint
) -> None:
    folder = make(base_folder, "a", 1)
    rewrite_config(folder, **entries)
    with pytest.raises(CheckpointError, match=message):
        read(folder, base)


def test_dora_made_by_peft_is_refused(base_folder: Path, base: Checkpoint) -> None:
    folder = make(base_folder, "a", 1, use_dora=True)
    with pytest.raises(CheckpointError, match="DoRA"):
        read(folder, base)
    rewrite_config(folder, use_dora=False)
    with pytest.raises(CheckpointError, match=r"lora_magnitude_vector.* cannot be merged: DoRA"):
        read(folder, base)


def test_pickled_adapters_are_never_opened(base_folder: Path, base: Checkpoint) -> None:
    folder = make(base_folder, "a", 1)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"a: only pickled weights \(adapter_model.bin\).*never opened"):
        read(folder, base)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        read(folder, base)
    with pytest.raises(CheckpointError, match="never opened"):
        adapter_weights(["adapter_config.json", "adapter_model.bin"], "a")


def test_what_counts_as_an_adapter() -> None:
    assert is_adapter({"adapter_config.json", "adapter_model.safetensors", "README.md"})
    assert not is_adapter({"config.json", "model.safetensors"})
    assert not is_adapter({"config.json", "model.safetensors", "adapter_config.json"})


def test_adapters_of_another_model(base_folder: Path, base: Checkpoint) -> None:
    folder = make(base_folder, "a", 1)
    key = "base_model.model.encoder.layers.0.mlp.fc1.lora_A.weight"
    good = load_file(folder / "adapter_model.safetensors")[key]
    cases: list[tuple[Callable[[StateDict], Any], type[EpimerError], str]] = [
        (lambda s: s.update({key: torch.zeros(4, 20)}), MismatchError, rf"{FC1} has factors .*another model"),
        (lambda s: s.pop(key), CheckpointError, "lora_A.weight is missing: it is incomplete"),
        (lambda s: s.update({key: torch.zeros(0)}), CheckpointError, f"{key} is empty or no matrix"),
        (lambda s: s.update({key: torch.full((4, 32), torch.nan)}), CheckpointError, f"NaN or Inf in {key}"),
        (
            lambda s: s.update({key: good, key.replace("layers.0", "layers.7"): good.clone()}),
            CheckpointError,
            "layers.7.*is missing",
        ),
        (
            lambda s: s.update({key.replace("layers.0", "layers.7").replace("_A", "_B"): torch.zeros(48, 4)}),
            MismatchError,
            "adapts vision_model.encoder.layers.7.mlp.fc1.weight, which the base does not have",
        ),
    ]
    for change, kind, message in cases:
        rewrite_weights(folder, change)
        with pytest.raises(kind, match=message):
            read(folder, base).low_rank(FC1)


def test_other_parts_of_the_model_are_left_out_with_a_warning(
    base_folder: Path, base: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(base_folder, "a", 1)
    extra = {
        "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.zeros(4, 8),
        "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_B.weight": torch.zeros(8, 4),
        "base_model.model.classifier.weight": torch.zeros(3, 32),
        "base_model.model.visual_projection.weight": torch.zeros(24, 32),
    }
    before = read(folder, base).changed
    rewrite_weights(folder, lambda s: s.update(extra))
    with caplog.at_level(logging.WARNING):
        assert read(folder, base).changed == before
    assert "a: 4 of its tensors are no part of the vision tower" in caplog.text
    rewrite_weights(folder, lambda s: [s.pop(key) for key in list(s) if key not in extra])
    with pytest.raises(CheckpointError, match="changes nothing in the vision tower"):
        read(folder, base)


def test_what_peft_cannot_store_is_refused(zoo: list[Adapter], base: Checkpoint, tmp_path: Path) -> None:
    from hf_epimer.lora import MergedUpdate

    updates = list(merge_adapters(zoo, METHODS["mean"], METHODS["mean"].config()))
    name = "vision_model.embeddings.class_embedding"
    with pytest.raises(OutputError, match=r"class_embedding.*--dense"):
        write_adapter(tmp_path, [*updates, MergedUpdate(name, (32,), torch.ones(32), {})], base, **NEWEST)
    with pytest.raises(OutputError, match="zero in every layer"):
        write_adapter(tmp_path, updates_nothing(zoo), base, **NEWEST)
    huge = [MergedUpdate(u.name, u.shape, u.update.scaled(1e12), {}) for u in updates if isinstance(u.update, LowRank)]
    with pytest.raises(NumericalError, match=r"do not fit into torch\.float16"):
        write_adapter(tmp_path, huge, base, **NEWEST, dtype=torch.float16)
    assert not (tmp_path / "adapter_config.json").exists()


def updates_nothing(zoo: list[Adapter]) -> Iterator[Any]:
    return merge_adapters(zoo, METHODS["frechet-lora"], FrechetLoraConfig(alpha=0.0))
