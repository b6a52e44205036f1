"""Bases and heads with which no class can be told from another: refused by name, and never kept in the cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.command import Run, contents, fails
from helpers.versions import needs_transformers
from hf_epimer.outside import leads_elsewhere

NAN = float("nan")


@pytest.fixture
def zoo(clip_zoo: Path, own_home: Path, tmp_path: Path) -> Path:
    """base/, a/ and a task file, of this test's own."""
    for name in ("base", "a"):
        shutil.copytree(clip_zoo / name, tmp_path / name)
    task = {**json.loads((clip_zoo / "a.json").read_text()), "dataset": str(clip_zoo / "data" / "a")}
    (tmp_path / "a.json").write_text(json.dumps(task))
    return tmp_path


def words(*more: object) -> list[object]:
    return ["evaluate", "a", "--base", "base", "--task", "a.json", *more]


def poison(file: Path, name: str, value: float) -> None:
    tensors = load_file(file)
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("a", "vision_model.post_layernorm.weight"),
        ("base", "text_model.final_layer_norm.bias"),
        ("base", "text_projection.weight"),
        ("base", "visual_projection.weight"),
        ("base", "logit_scale"),
    ],
)
def test_nan_is_named_and_no_head_is_kept(
    folder: str, name: str, value: float, zoo: Path, own_home: Path, run: Run
) -> None:
    poison(zoo / folder / "model.safetensors", name, value)
    fails(run(*words()), rf"{folder}: NaN or Inf in {name}")
    assert not (own_home / "heads").exists() or folder == "a"


@pytest.mark.parametrize("value", [NAN, float("-inf")])
def test_nan_in_a_head_file_is_named(value: float, zoo: Path, run: Run) -> None:
    task = json.loads((zoo / "a.json").read_text())
    for name, tensors in {
        "weight": {"weight": torch.randn(3, 10).index_fill_(0, torch.tensor([1]), value)},
        "bias": {"weight": torch.randn(3, 10), "bias": torch.full((3,), value)},
    }.items():
        save_file(tensors, zoo / "head.safetensors")
        (zoo / "a.json").write_text(json.dumps({**task, "head": "head.safetensors"}))
        fails(run(*words()), rf"head.safetensors: NaN or Inf in {name}")
    save_file({"weight": torch.ones(3, 10)}, zoo / "head.safetensors")
    fails(run(*words()), "head.safetensors: the rows of 'a' and 'b' are the same")
    (zoo / "head.safetensors").write_bytes((zoo / "head.safetensors").read_bytes()[:-1])
    fails(run(*words()), "head.safetensors: cannot be read as the head of a task")


TOKENIZERS: dict[str, tuple[str, ...]] = {
    "all of it": ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
    "its words": ("tokenizer.json", "vocab.json"),
}


@pytest.mark.parametrize("missing", TOKENIZERS)
@pytest.mark.parametrize("command", ["evaluate", "merge", "fisher", "statistics"])
def test_a_base_without_tokenizer_is_refused_before_anything_is_made(
    missing: str, command: str, zoo: Path, run: Run
) -> None:
    for name in TOKENIZERS[missing]:
        (zoo / "base" / name).unlink(missing_ok=True)
    common = ["--base", "base", "--task", "a.json"]
    given = {
        "evaluate": words(),
        "merge": ["merge", "a=a", *common, "--method", "mean", "--evaluate", "--out", "out"],
        "fisher": ["fisher", "a", *common, "--out", "out"],
        "statistics": ["merge", "a=a", *common, "--method", "fisher", "--out", "out"],
    }[command]
    fails(run(*given), "tokenizer")
    assert not (zoo / "out").exists()


def test_vocabulary_and_merges_are_a_tokenizer_too(zoo: Path, run: Run) -> None:
    needs_transformers("5.0", "a CLIP tokenizer is saved as one file")
    stored = json.loads((zoo / "base" / "tokenizer.json").read_text())["model"]
    (zoo / "base" / "vocab.json").write_text(json.dumps(stored["vocab"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in stored["merges"]]
    (zoo / "base" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (zoo / "base" / "tokenizer.json").unlink()
    assert run(*words())[0] == 0


def test_a_tokenizer_of_another_kind_is_named(zoo: Path, run: Run) -> None:
    settings = json.loads((zoo / "base" / "tokenizer_config.json").read_text())
    (zoo / "base" / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "BertTokenizer"}))
    fails(run(*words()), "tokenizer_config.json says that its tokenizer is a BertTokenizer")
    (zoo / "base" / "tokenizer_config.json").write_text("[" * 100_000)
    fails(run(*words()), "tokenizer_config.json is not readable JSON")
    (zoo / "base" / "tokenizer_config.json").unlink()
    (zoo / "base" / "tokenizer.json").write_text("{")
    fails(run(*words()), "base: its tokenizer cannot be read")


def without_words(tokenizer: dict[str, object]) -> None:
    model = tokenizer["model"]
    assert isinstance(model, dict)
    model["vocab"] = {word: number for word, number in model["vocab"].items() if word.startswith("<|")}
    model["merges"] = []


def without_unknown(tokenizer: dict[str, object]) -> None:
    tokenizer["added_tokens"] = []
    model = tokenizer["model"]
    assert isinstance(model, dict)
    model |= {"vocab": {}, "merges": []}


def beyond_the_embedding(tokenizer: dict[str, object]) -> None:
    model = tokenizer["model"]
    assert isinstance(model, dict)
    model["vocab"] = {word: number + 10_000 * (not word.startswith("<|")) for word, number in model["vocab"].items()}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without_words, "no difference between 'a' and 'b' of task 'a'"),
        (beyond_the_embedding, "tokens that its text tower does not have"),
        (without_unknown, "base: its tokenizer cannot read 'a b.'"),
    ],
)
def test_a_tokenizer_that_does_not_belong_to_the_text_tower(
    change: Callable[[dict[str, object]], None], why: str, zoo: Path, own_home: Path, run: Run
) -> None:
    needs_transformers("5.0", "a CLIP tokenizer is saved as one file")
    tokenizer = json.loads((zoo / "base" / "tokenizer.json").read_text())
    change(tokenizer)
    (zoo / "base" / "tokenizer.json").write_text(json.dumps(tokenizer))
    fails(run(*words()), why)
    assert not (own_home / "heads").exists()


def test_a_head_that_an_earlier_release_kept_is_looked_at_again(zoo: Path, own_home: Path, run: Run) -> None:
    code, good, _ = run(*words("--json"))
    assert code == 0
    (kept,) = (own_home / "heads").iterdir()
    right = kept.read_bytes()
    for damage in (lambda head: head.fill_(0.3), lambda head: head[0].fill_(NAN), lambda head: head[1].copy_(head[0])):
        tensors = load_file(kept)
        damage(tensors["head"])
        save_file(tensors, kept)
        assert run(*words("--json"))[1] == good
        assert kept.read_bytes() == right
    poison(zoo / "base" / "model.safetensors", "logit_scale", NAN)  # another base by its content
    assert run(*words())[0] == 1
    assert contents(own_home / "heads") == [kept.name]


# --- the image processor --------------------------------------------------------------------------------------------


def makes(size: int) -> str:
    return f'"size": {{"shortest_edge": {size}}}, "crop_size": {{"height": {size}, "width": {size}}}'


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "there is no preprocessor_config.json"),
        ("[1]", "is not a JSON object"),
        ("[" * 100_000, "is not readable JSON"),
        ('{"a": "' + "x" * 2**20 + '"}', "larger than 1 MiB"),
        (f"{{{makes(32)}}}", "makes pictures of 32 x 32, and the vision tower takes 8 x 8"),
        ('{"do_center_crop": false, "size": {"shortest_edge": 8}}', "and the vision tower takes 8 x 8"),
        ('{"size": "large"}', "describes no image processor"),
        (f'{{"image_std": [0, 0, 0], {makes(8)}}}', "NaN or Inf in the logits"),
    ],
)
def test_a_base_whose_image_processor_does_not_fit(content: str | None, why: str, zoo: Path, run: Run) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        (zoo / "base" / name).unlink(missing_ok=True)
    if content is not None:
        (zoo / "base" / "preprocessor_config.json").write_text(content)
    fails(run(*words()), why)


def test_settings_are_written_anew_and_never_through_a_link(zoo: Path, run: Run) -> None:
    words = ["merge", "a", "--base", "base", "--method", "mean", "--out", "out"]
    settings = zoo / "base" / "preprocessor_config.json"
    good = json.loads(settings.read_text())
    (zoo / "secret.json").write_text('{"token": "hf_secret"}')
    settings.unlink()
    settings.symlink_to("../secret.json")
    fails(run(*words), r"base: preprocessor_config.json is a link out of the folder, to .*secret.json")
    assert not (zoo / "out").exists()
    for content, why in (("hf_secret", "readable JSON"), ('{"a": "' + "x" * 2**20 + '"}', "larger than 1 MiB")):
        settings.unlink(missing_ok=True)
        settings.write_text(content)
        fails(run(*words), f"base: preprocessor_config.json is not {why}|{why}")
    settings.unlink()
    (zoo / "base" / "settings.json").write_text(json.dumps(good))
    settings.symlink_to("settings.json")  # as in a folder of hard to tell origin, but of its own
    assert run(*words)[0] == 0
    written = zoo / "out" / "preprocessor_config.json"
    assert not written.is_symlink() and json.loads(written.read_text()) == good


def test_links_of_the_hubs_cache_stay_in_its_repo(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--a" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--a" / "blobs").mkdir()
    (tmp_path / "models--org--a" / "blobs" / "x").write_text("{}")
    (tmp_path / "secret").write_text("{}")
    (snapshot / "good").symlink_to("../../blobs/x")
    (snapshot / "bad").symlink_to(tmp_path / "secret")
    assert not leads_elsewhere(snapshot / "good")
    assert leads_elsewhere(snapshot / "bad")


@pytest.mark.parametrize("folder", ["a", "base"])
def test_a_model_that_says_it_is_quantised(folder: str, zoo: Path, run: Run) -> None:
    config = json.loads((zoo / folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (zoo / folder / "config.json").write_text(json.dumps(config))
    for given in (words(), ["merge", "a", "--base", "base", "--method", "mean", "--out", "out"]):
        fails(run(*given), rf"{folder}.*its weights are quantised \(bitsandbytes\)")
