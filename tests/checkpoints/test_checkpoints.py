"""Reading every layout of a checkpoint, writing atomically, and refusing what is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.checkpoints import TINY, StateDict, tiny_fisher, tiny_state, write_checkpoint
from helpers.command import Run, fails
from hf_epimer import merge_state_dicts
from hf_epimer.checkpoints import reader as checkpoints
from hf_epimer.checkpoints.reader import Checkpoint
from hf_epimer.checkpoints.writer import write_tensors
from hf_epimer.errors import CheckpointError
from hf_epimer.hub.refs import ModelRef
from hf_epimer.models.clip import CLIP
from hf_epimer.models.source import resolve_model


def weight_files(folder: Path) -> list[Path]:
    source = resolve_model(ModelRef.parse(str(folder)))
    return [source.fetch(name) for name in source.weight_files]


def strip(state: StateDict) -> StateDict:
    return {name.removeprefix("vision_model."): value for name, value in state.items()}


def full_clip(state: StateDict) -> StateDict:
    extra = {
        "text_model.final_layer_norm.weight": torch.ones(8),
        "text_projection.weight": torch.ones(24, 8),
        "visual_projection.weight": torch.ones(24, 32),
        "logit_scale": torch.tensor(4.6),
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    return state | extra


LAYOUTS: dict[str, Callable[[StateDict], StateDict]] = {
    "vision_model prefix (transformers 4)": lambda s: s,
    "no prefix (transformers 5.6)": strip,
    "full CLIPModel": full_clip,
    "nested below clip": lambda s: {f"clip.{n}": v for n, v in s.items()},
    "nested below model": lambda s: {f"model.{n}": v for n, v in s.items()},
    "data parallel": lambda s: {f"module.{n}": v for n, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.module.{n}": v for n, v in s.items()},
    "cut out of a VLM": lambda s: {f"vision_tower.{n}": v for n, v in s.items()},
    "of a newer VLM": lambda s: {f"model.vision_tower.{n}": v for n, v in s.items()},
    "of a newer VLM, no prefix": lambda s: {f"model.vision_tower.{n}": v for n, v in strip(s).items()},
    "with a classifier": lambda s: s | {"classifier.weight": torch.ones(4, 32), "classifier.bias": torch.ones(4)},
    "with projection": lambda s: s | {"visual_projection.weight": torch.ones(24, 32)},
    "fp16": lambda s: {n: v.half() for n, v in s.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_canonical_names(layout: str, tmp_path: Path, base_state: StateDict) -> None:
    folder = write_checkpoint(tmp_path / "m", LAYOUTS[layout](base_state))
    found = Checkpoint("m", weight_files(folder), CLIP.canonical)
    assert found.shapes == CLIP.shapes(TINY) == {n: tuple(v.shape) for n, v in base_state.items()}
    assert all(torch.allclose(found.tensor(n).float(), base_state[n], atol=1e-2) for n in base_state)


def test_a_name_of_wrappers_alone_is_not_unwrapped_for_ever() -> None:
    name = "model." * 1_000_000
    assert CLIP.canonical(name) == name


OLD_CONFIG = {"model_type": "clip", "vision_config": None, "vision_config_dict": TINY}


@pytest.mark.parametrize(
    "config", [OLD_CONFIG, {"model_type": "clip", "vision_config": {}, "vision_config_dict": TINY}]
)
def test_configs_from_before_transformers_4_27(config: dict[str, object]) -> None:
    assert CLIP.vision_config(config, "m") == TINY


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers in config.json is 1000000000, not a positive number"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"image_size": 10**9}, "image_size"),
        ({"num_attention_heads": True}, "num_attention_heads in config.json is True"),
        ({"hidden_size": "7" * 100_000}, "hidden_size in config.json is something"),
    ],
)
@pytest.mark.timeout(20)
def test_a_config_that_promises_too_much(config: dict[str, object], why: str) -> None:
    for nested in (False, True):
        whole = {"model_type": "clip", "vision_config": {**TINY, **config}} if nested else config
        with pytest.raises(CheckpointError, match=why):
            CLIP.vision_config({"model_type": "clip_vision_model", **whole}, "m")
    with pytest.raises(CheckpointError, match=r"vision_config_dict in config.json is not an object"):
        CLIP.vision_config({"model_type": "clip", "vision_config_dict": [1]}, "m")


def test_a_classifier_that_no_config_speaks_of_is_left_out_with_a_word(
    tmp_path: Path, run: Run, base_state: StateDict
) -> None:
    config = {"model_type": "clip", "vision_config": TINY}
    tuned = tiny_state(1, base_state)
    write_checkpoint(tmp_path / "base", base_state)
    write_checkpoint(tmp_path / "a", tuned | {"classifier.weight": torch.ones(4, 32)}, config=config)
    words = ["merge", tmp_path / "a", "--base", tmp_path / "base", "--method", "mean", "--out", tmp_path / "out"]
    code, _, complaint = run(*words)
    assert (code, complaint) == (0, "warning: a: its classifier is left out; what is merged is the vision tower\n")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(merged[name], value, atol=1e-6) for name, value in tuned.items())
    assert merged.keys() == tuned.keys()


def test_unknown_tensors_keep_their_names_so_that_they_are_reported() -> None:
    assert CLIP.canonical("adapter.lora_A.weight") == "adapter.lora_A.weight"


@pytest.mark.parametrize("prefix", ["student.vision_model.", "visual.", "net.encoder.vision_model."])
def test_a_prefix_that_is_not_known_is_named(prefix: str, tmp_path: Path, run: Run, base_state: StateDict) -> None:
    base = write_checkpoint(tmp_path / "base", base_state)
    renamed = {prefix + name.removeprefix("vision_model."): value for name, value in tiny_state(1, base_state).items()}
    a = write_checkpoint(tmp_path / "a", renamed)
    result = run("merge", a, "--base", base, "--method", "mean", "--out", tmp_path / "out")
    fails(result, f"its names have the prefix '{prefix.removesuffix('vision_model.')}', which is none that is known")
    write_checkpoint(tmp_path / "a", {"other.weight": torch.zeros(3)})
    code, _, complaint = run("merge", a, "--base", base, "--method", "mean", "--out", tmp_path / "out")
    assert code == 1 and "prefix" not in complaint


def test_old_and_new_layouts_give_the_same_merge(tmp_path: Path, run: Run, base_state: StateDict) -> None:
    results = []
    for name in ("vision_model prefix (transformers 4)", "no prefix (transformers 5.6)", "full CLIPModel"):
        folder = tmp_path / name.split()[0]
        config = {"model_type": "clip", "vision_config": TINY} if name.startswith("full") else {}
        write_checkpoint(folder / "base", LAYOUTS[name](base_state), config=config)
        tuned = [tiny_state(seed, base_state) for seed in (1, 2)]
        paths = [write_checkpoint(folder / f"t{i}", LAYOUTS[name](s), config=config) for i, s in enumerate(tuned)]
        code, _, complaint = run("merge", *paths, "--base", folder / "base", "--method", "tsv-m", "--out", folder / "o")
        assert code == 0, complaint
        results.append(load_file(folder / "o" / "model.safetensors"))
    assert all(torch.equal(results[0][n], other[n]) for other in results[1:] for n in results[0])
    assert all(name.startswith("vision_model.") for name in results[0])


def test_sharded_checkpoints_are_read_and_written(tmp_path: Path, run: Run, base_state: StateDict) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    shapes = {name: tuple(value.shape) for name, value in base_state.items()}
    written = write_tensors(folder, shapes, torch.float32, base_state.items(), max_shard_bytes=20_000)
    assert len(written) > 3
    assert written[-1] == "model.safetensors.index.json"
    found = Checkpoint("s", weight_files(folder), CLIP.canonical)
    assert all(torch.equal(found.tensor(n), base_state[n]) for n in base_state)
    index = json.loads((folder / written[-1]).read_text())
    (folder / index["weight_map"]["vision_model.post_layernorm.bias"]).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        weight_files(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_written_files_are_ordinary_safetensors(dtype: torch.dtype, tmp_path: Path, base_state: StateDict) -> None:
    shapes = {name: tuple(value.shape) for name, value in base_state.items()}
    assert write_tensors(tmp_path, shapes, dtype, base_state.items()) == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[n], base_state[n].to(dtype)) for n in base_state)


def test_streamed_is_the_same_as_in_memory(tiny_zoo: Path, run: Run, base_state: StateDict) -> None:
    for method in ("epimer", "ties", "dare", "iso-cts"):
        out = tiny_zoo / method
        paths = [tiny_zoo / name for name in "abc"]
        code, _, complaint = run("merge", *paths, "--base", tiny_zoo / "base", "--method", method, "--out", out)
        assert code == 0, complaint
        tuned = [tiny_state(seed, base_state) for seed in (1, 2, 3)]
        fisher = [tiny_fisher(10 + seed) for seed in (1, 2, 3)] if method == "epimer" else None
        expected = merge_state_dicts(base_state, tuned, method=method, statistics=fisher, labels=list("abc"))
        read = load_file(out / "model.safetensors")
        assert all(torch.equal(read[n], expected[n]) for n in expected), method


def test_transformers_loads_the_result_with_nothing_missing_or_left_over(tiny_zoo: Path, run: Run) -> None:
    from transformers import CLIPVisionModel

    code, _, complaint = run("merge", tiny_zoo / "a", "--base", tiny_zoo / "base", "--out", tiny_zoo / "o")
    assert code == 0, complaint
    model, report = CLIPVisionModel.from_pretrained(tiny_zoo / "o", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.hidden_size == TINY["hidden_size"]
    assert model.config.patch_size == TINY["patch_size"]


# --- damaged and foreign files --------------------------------------------------------------------------------------


def test_truncated_and_corrupt_files(tmp_path: Path, base_state: StateDict) -> None:
    folder = write_checkpoint(tmp_path / "m", base_state)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], content[:5], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            Checkpoint("m", [file], CLIP.canonical)


@pytest.mark.parametrize("suffix", checkpoints.PICKLED)
def test_pickles_are_never_opened(suffix: str, tmp_path: Path, base_state: StateDict) -> None:
    folder = write_checkpoint(tmp_path / "m", base_state)
    (folder / "model.safetensors").rename(folder / f"pytorch_model{suffix}")
    with pytest.raises(CheckpointError, match=r"pickled.*save_pretrained"):
        weight_files(folder)
    (folder / f"pytorch_model{suffix}").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        weight_files(folder)


def test_a_tensor_stored_under_two_prefixes_is_an_error(tmp_path: Path, base_state: StateDict) -> None:
    name = "vision_model.post_layernorm.bias"
    twice = base_state | {name.removeprefix("vision_model."): base_state[name].clone()}
    save_file(twice, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="twice"):
        Checkpoint("x", [tmp_path / "x.safetensors"], CLIP.canonical)
