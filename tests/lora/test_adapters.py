"""Adapters on disk: made by PEFT, read, written, loaded by PEFT again, and those that are refused."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.adapters import (
    FC1,
    NEWEST,
    QUERY,
    dense,
    difference,
    folded,
    key_of,
    make,
    read,
    rewrite_config,
    rewrite_weights,
    updates_of,
)
from helpers.checkpoints import TINY, StateDict
from hf_epimer.checkpoints.reader import Checkpoint, TaskVectorSource
from hf_epimer.errors import (
    CheckpointError,
    EpimerError,
    MismatchError,
    NumericalError,
    OutputError,
)
from hf_epimer.lora import Adapter, fold_updates, is_adapter, merge_adapters, write_adapter
from hf_epimer.lora.peft_files import adapter_weights
from hf_epimer.methods import METHODS
from hf_epimer.methods.frechet_lora import FrechetLoraConfig
from hf_epimer.numerics.lowrank import LowRank

peft = pytest.importorskip("peft")


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


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
    stored = load_file(folder / "adapter_model.safetensors")[key_of(folder, QUERY)]
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
    tensors = {name: new.tensor(name) for name in base.shapes}  # before its file is written anew
    file = folder / "adapter_model.safetensors"
    root = "base_model.model."
    stored = {key.removeprefix(root).removeprefix("vision_model."): value for key, value in load_file(file).items()}
    save_file({root + prefix + key: value for key, value in stored.items()}, file)
    old = read(folder, base)
    assert old.changed == new.changed
    assert all(torch.equal(old.tensor(name), tensor) for name, tensor in tensors.items())


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
    assert all(torch.allclose(found[m.name], m.tensor, atol=1e-6) for m in fold_updates(updates, base))


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
    key = key_of(folder, FC1)
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
