"""Adapters as other programs and older releases lay them out: read as the plain one, or refused with a key shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.adapters import make, read, rewrite_config, rewrite_weights
from helpers.checkpoints import StateDict
from helpers.command import Run, fails
from hf_epimer.checkpoints.reader import Checkpoint
from hf_epimer.errors import CheckpointError, MismatchError

pytest.importorskip("peft")

SETTINGS: dict[str, Any] = {
    "target_modules": ["q_proj", "position_embedding"],
    "modules_to_save": ["post_layernorm", "mlp"],
    "bias": "lora_only",
}


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    def change(tensors: StateDict) -> None:
        moved = {rename(key): value for key, value in tensors.items()}
        assert set(moved) != set(tensors)
        tensors.clear()
        tensors.update(moved)

    rewrite_weights(folder, change)


def named(key: str, name: str = "default") -> str:
    """As `get_peft_model(...).state_dict()` has it."""
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        key = key.replace(f".{part}.", f".{part}.{name}.")
        key = f"{key}.{name}" if key.endswith(part) else key
    for module in ("post_layernorm", "mlp"):
        key = key.replace(f".{module}.", f".{module}.modules_to_save.{name}.")
    return key


LAYOUTS: dict[str, Callable[[str], str]] = {
    "twice in a PeftModel": lambda key: "base_model.model." + key,
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "the adapter's name": named,
    "another name": lambda key: named(key, "my_task"),
    "a name with a hyphen": lambda key: named(key, "my-task"),
    "both": lambda key: "base_model.model." + named(key),
    "whole modules": lambda key: key.replace(".post_layernorm.", ".post_layernorm.modules_to_save."),
    "transformers 4": lambda key: key.replace("base_model.model.", "base_model.model.vision_model."),
    "data parallel": lambda key: key.replace("base_model.model.", "base_model.model.module.vision_model."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_adapter(layout: str, base_folder: Path, base: Checkpoint) -> None:
    folder = make(base_folder, "a", 1, **SETTINGS)
    plain = read(folder, base)
    expected = {name: plain.tensor(name) for name in plain.changed}
    renamed(folder, LAYOUTS[layout])
    found = read(folder, base)
    assert found.changed == plain.changed and not found.foreign
    for name, value in expected.items():
        assert torch.equal(found.tensor(name), value)


def test_what_modules_to_save_replace_is_left_out(base_folder: Path, base: Checkpoint) -> None:
    folder = make(base_folder, "a", 1, **SETTINGS)
    before = read(folder, base).changed
    original = {"base_model.model.post_layernorm.original_module.weight": torch.zeros(32)}
    rewrite_weights(folder, lambda tensors: tensors.update(original))
    assert read(folder, base).changed == before


def test_two_adapters_in_one_file_are_refused(base_folder: Path, base: Checkpoint) -> None:
    folder = make(base_folder, "a", 1)
    tensors = load_file(folder / "adapter_model.safetensors")
    twice = {named(key, name): value + 0 for key, value in tensors.items() for name in ("x", "y")}
    rewrite_weights(folder, lambda s: [s.clear(), s.update(twice)])
    with pytest.raises(CheckpointError, match=r"several adapters, x \(.*lora_[AB].x.weight\), y \("):
        read(folder, base)


def test_one_parameter_under_two_keys_is_refused(base_folder: Path, base: Checkpoint) -> None:
    folder = make(base_folder, "a", 1)
    rewrite_weights(folder, lambda s: s.update({"base_model.model." + key: s[key] + 0 for key in list(s)[:2]}))
    with pytest.raises(CheckpointError, match="are the same parameter"):
        read(folder, base)
    folder = make(base_folder, "b", 1)
    prefix = "base_model.model."
    rewrite_weights(
        folder, lambda s: s.update({key.replace(prefix, f"{prefix}vision_model."): s[key] + 0 for key in [*s]})
    )
    with pytest.raises(CheckpointError, match="is stored twice"):
        read(folder, base)


@pytest.mark.parametrize(
    "key",
    [
        "lora_te_vision_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_unet_down_blocks_0.alpha",
        "vision_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
        "encoder.layers.0.self_attn.processor.to_q_lora.down.weight",
        "encoder.layers.0.self_attn.q_proj.lora.down.weight",
    ],
)
def test_layouts_of_other_programs_are_called_that(key: str, base_folder: Path, base: Checkpoint) -> None:
    folder = make(base_folder, "a", 1)
    rewrite_weights(folder, lambda s: [s.clear(), s.update({key: torch.ones(4, 4)})])
    with pytest.raises(CheckpointError, match="kohya's scripts or diffusers") as refused:
        read(folder, base)
    assert key in str(refused.value)


def test_an_adapter_of_which_half_fits_nothing_is_refused(base_folder: Path, base: Checkpoint) -> None:
    folder = make(base_folder, "a", 1, target_modules=["q_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {key: re.sub(r"(vision_model\.)?encoder\.layers", "language_model.blocks", key) for key in tensors}
    other = {names[key]: value + 0 for key, value in tensors.items()}
    few = dict(list(other.items())[:-1])
    rewrite_weights(folder, lambda s: s.update(few))
    assert read(folder, base).foreign == sorted(few)
    rewrite_weights(folder, lambda s: s.update(other))
    with pytest.raises(MismatchError, match=r"a: 4 of its 8 tensors fit nothing in the base, .*language_model"):
        read(folder, base)


def test_parts_of_a_full_model_may_be_more_than_half(base_folder: Path, base: Checkpoint) -> None:
    folder = make(base_folder, "a", 1, target_modules=["q_proj"])
    text = {
        key.replace("model.encoder", f"model.text_model.{n}.encoder"): value + 0
        for key, value in load_file(folder / "adapter_model.safetensors").items()
        for n in range(3)
    }
    rewrite_weights(folder, lambda s: s.update(text))
    assert len(read(folder, base).foreign) == 12


ZEROS: dict[str, Callable[[Path], None]] = {
    "B": lambda folder: rewrite_weights(folder, lambda s: [v.zero_() for k, v in s.items() if "lora_B" in k]),
    "A": lambda folder: rewrite_weights(folder, lambda s: [v.zero_() for k, v in s.items() if "lora_A" in k]),
    "alpha": lambda folder: rewrite_config(folder, lora_alpha=0),
}


@pytest.mark.parametrize("what", ZEROS)
@pytest.mark.parametrize("flags", [[], ["--dense"]])
def test_an_adapter_that_changes_nothing_is_refused(
    what: str, flags: list[str], base_folder: Path, run: Run, tmp_path: Path
) -> None:
    nothing, other = make(base_folder, "zero", 1, bias="none"), make(base_folder, "b", 2)
    ZEROS[what](nothing)
    words = ["merge", nothing, other, "--base", base_folder, "--method", "mean", *flags, "--out", tmp_path / "out"]
    fails(run(*words), "zero: its adapter is zero: there is nothing to merge")
    assert not (tmp_path / "out").exists()


def test_hostile_patterns_are_one_line(base_folder: Path, run: Run, tmp_path: Path) -> None:
    folder = make(base_folder, "a", 1)
    for entries in ({"rank_pattern": {"(a+)+$": 4}}, {"alpha_pattern": {str(n): 1 for n in range(100_000)}}):
        rewrite_config(folder, **entries)
        words = ["merge", folder, "--base", base_folder, "--method", "mean", "--out", tmp_path / "out"]
        fails(run(*words), r"a: adapter_config.json: .*_pattern")
        rewrite_config(folder, rank_pattern={}, alpha_pattern={})
    (folder / "adapter_config.json").write_text("[" * 100_000)
    fails(run(*words), r"a: adapter_config.json is not readable JSON \(it is nested too deeply\)")
