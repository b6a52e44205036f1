"""Merges that are refused: one line that says why, and nothing half-written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.checkpoints import TINY, StateDict, card, rewrite, tiny_fisher, write_checkpoint
from helpers.command import Run, contents, fails
from hf_epimer.checkpoints.manifest import find_foreign


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["merge"], "give the checkpoints"),
        (["merge", "a", "--method", "epimer", "--rank", "0"], "--rank must be at least 1"),
        (["merge", "a", "--method", "epimer", "--rank", "x"], "--rank"),
        (["merge", "a", "--alpha", "nan"], "--alpha must be a finite number"),
        (["merge", "a", "--alpha", "inf"], "--alpha must be a finite number"),
        (["merge", "a", "--density", "0.1"], "epimer-core has no option --density; ties have it"),
        (["merge", "a", "--method", "mean", "--alpha", "1"], "mean has no option --alpha; epimer, epimer-core"),
        (["merge", "a", "--method", "magic"], "no method 'magic'; there are epimer"),
        (["merge", "a", "--method", "epimer", "--aggregator", "max"], "--aggregator 'max' is not one of sum, mean"),
        (["merge", "a", "b", "--weights", "1"], "2 models, 1 weights"),
        (["merge", "a", "b", "--weights", "1", "-1"], "negative"),
        (["merge", "a", "b", "--weights", "0", "0"], "something positive"),
        (["merge", "a", "b", "--weights", "1", "nan"], "finite"),
        (["merge", "a", "--dtype", "int8"], "--dtype"),
        (["merge", "a", "--push-to", "nothing"], "--push-to 'nothing'"),
        (["merge", "a", "--create-pr"], "--create-pr needs --push-to"),
        (["merge", "a", "--private"], "--private needs --push-to"),
        (["merge", "a", "--seed", "-1"], "--seed must be"),
        (["merge", "a", "b", "--weights", "1e308", "1e308"], "too large"),
        (["merge", "a", "--device", "meta"], "--device meta is not available"),
        (["merge", "a", "--method", "ties", "--density", "0"], "--density must be above 0"),
        (["push", "a", "nothing"], "not of the form org/name"),
        (["merge", "a", "--device", "cuda:7"], "--device cuda:7 is not available"),
        (["merge", "a", "--config", "nowhere.json"], "nowhere.json"),
        (["merge", "what is this"], "neither a folder nor a Hub id"),
        (["merge", "bad label=a"], "label"),
        (["merge", "a", "--no-such-flag"], "--no-such-flag"),
        (["mrege"], "no command 'mrege'"),
        ([], "required"),
        (["merge", "a", "--fisher", "b", "--method", "mean"], "mean uses no Fisher"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    words: list[str], pattern: str, tiny_zoo: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_zoo)
    before = contents(tiny_zoo)
    fails(run(*words, *(["--base", "base"] if words and words[-1] in ("inf", "mean") else [])), pattern, 2)
    assert contents(tiny_zoo) == before


def refuse(tiny_zoo: Path, run: Run, pattern: str, *extra: object, models: tuple[str, ...] = ("a", "b")) -> None:
    """The merge fails with one line, and neither the target nor anything temporary is left."""
    before = contents(tiny_zoo)
    paths = [tiny_zoo / name for name in models]
    fails(run("merge", *paths, "--base", tiny_zoo / "base", "--out", tiny_zoo / "out", *extra), pattern)
    assert contents(tiny_zoo) == before


def test_folders_that_are_not_there_or_not_checkpoints(tiny_zoo: Path, run: Run) -> None:
    (tiny_zoo / "empty").mkdir()
    refuse(tiny_zoo, run, "nowhere.*does not exist", models=("nowhere",))
    refuse(tiny_zoo, run, r"empty.*no config\.json", models=("a", "empty"))
    (tiny_zoo / "a" / "config.json").write_text("{not json")
    refuse(tiny_zoo, run, r"config\.json is not readable JSON")
    (tiny_zoo / "a" / "config.json").write_text('{"model_type": "bert"}')
    refuse(tiny_zoo, run, "is a bert model, the base base a CLIP vision model")


def test_pickled_weights_are_refused_before_any_work(tiny_zoo: Path, run: Run) -> None:
    (tiny_zoo / "b" / "model.safetensors").rename(tiny_zoo / "b" / "pytorch_model.bin")
    refuse(tiny_zoo, run, r"b: only pickled weights \(pytorch_model\.bin\).*Convert")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 3), ("hidden_size", 64), ("patch_size", 4), ("image_size", 32), ("hidden_act", "gelu")],
)
def test_unlike_architectures_are_listed_side_by_side(field: str, value: object, tiny_zoo: Path, run: Run) -> None:
    config = json.loads((tiny_zoo / "b" / "config.json").read_text()) | {field: value}
    (tiny_zoo / "b" / "config.json").write_text(json.dumps(config))
    refuse(tiny_zoo, run, rf"b is another architecture than the base base \({field}: {TINY[field]} \| {value}\)")


NAME = "vision_model.encoder.layers.1.mlp.fc2.weight"


def test_missing_extra_and_unlike_tensors(tiny_zoo: Path, run: Run) -> None:
    rewrite(tiny_zoo / "a", lambda s: s.pop(NAME))
    refuse(tiny_zoo, run, rf"a: the checkpoint does not fit the base: missing {NAME}")
    rewrite(tiny_zoo / "a", lambda s: s.update({NAME: torch.zeros(32, 48), "lora.weight": torch.zeros(2)}))
    refuse(tiny_zoo, run, r"a: .*unexpected lora\.weight")
    rewrite(tiny_zoo / "a", lambda s: (s.pop("lora.weight"), s.update({NAME: torch.zeros(4, 48)})))
    refuse(tiny_zoo, run, rf"{NAME} has shape \[4, 48\] instead of \[32, 48\]")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_name_the_checkpoint_and_the_tensor(bad: float, tiny_zoo: Path, run: Run) -> None:
    rewrite(tiny_zoo / "b", lambda s: s[NAME].view(-1)[7].fill_(bad))
    refuse(tiny_zoo, run, rf"b: NaN or Inf in {NAME}")
    rewrite(tiny_zoo / "base", lambda s: s[NAME].view(-1)[7].fill_(bad))
    refuse(tiny_zoo, run, rf"base: NaN or Inf in {NAME}")


def test_unusable_fisher_files(tiny_zoo: Path, run: Run) -> None:
    file, epimer = "fisher.safetensors", ("--method", "epimer")
    rewrite(tiny_zoo / "b", lambda s: s[NAME].view(-1)[7].fill_(float("nan")), file)
    refuse(tiny_zoo, run, rf"Fisher information of b .*NaN or Inf in {NAME}", *epimer)
    rewrite(tiny_zoo / "b", lambda s: s[NAME].view(-1)[7].fill_(-1), file)
    refuse(tiny_zoo, run, rf"Fisher information of b .*negative values in {NAME}", *epimer)
    rewrite(tiny_zoo / "b", lambda s: s.pop(NAME), file)
    refuse(tiny_zoo, run, rf"Fisher information of b .*missing {NAME}", *epimer)
    (tiny_zoo / "b" / file).write_bytes((tiny_zoo / "b" / file).read_bytes()[:1000])
    refuse(tiny_zoo, run, r"Fisher information of b .*truncated or corrupt", *epimer)
    (tiny_zoo / "b" / file).unlink()
    refuse(tiny_zoo, run, r"epimer needs the Fisher information of b=.*--fisher.*tsv-m, iso-c", *epimer)


def test_a_fisher_file_without_metadata_is_taken_with_a_warning(tiny_zoo: Path, run: Run) -> None:
    save_file(tiny_fisher(1), tiny_zoo / "a" / "fisher.safetensors")
    words = ("merge", tiny_zoo / "a", "--base", tiny_zoo / "base", "--method", "epimer", "--out", tiny_zoo / "out")
    code, _, complaint = run(*words)
    assert code == 0
    assert complaint.startswith("warning: Fisher information of a ")
    assert "metadata" in complaint


def test_a_model_cannot_be_its_own_base(tiny_zoo: Path, run: Run, base_state: StateDict) -> None:
    refuse(tiny_zoo, run, "is its own base", "--method", "mean", models=("a", "base"))
    write_checkpoint(tiny_zoo / "copy", {name: value.half() for name, value in base_state.items()})
    rewrite(tiny_zoo / "base", lambda s: [s.update({n: v.half()}) for n, v in list(s.items())])
    refuse(tiny_zoo, run, "copy: every tensor equals the base's", "--method", "mean", models=("a", "copy"))


def test_the_same_checkpoint_twice_is_a_warning(tiny_zoo: Path, run: Run) -> None:
    words = ["merge", tiny_zoo / "a", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base"]
    code, _, complaint = run(*words, "--out", tiny_zoo / "out")
    assert code == 0
    assert complaint == "warning: a is merged twice (as a and a-2)\n"


def test_an_existing_result_is_not_overwritten_by_accident(tiny_zoo: Path, run: Run) -> None:
    (tiny_zoo / "out").mkdir()
    (tiny_zoo / "out" / "precious").write_text("x")
    refuse(tiny_zoo, run, "not empty.*--overwrite", "--method", "mean")
    assert contents(tiny_zoo / "out") == ["precious"]
    words = ["merge", tiny_zoo / "a", "--base", tiny_zoo / "base", "--out", tiny_zoo / "out", "--method", "mean"]
    fails(run(*words, "--overwrite"), "only folders that hf-epimer wrote are")
    assert contents(tiny_zoo / "out") == ["precious"]
    (tiny_zoo / "out" / "precious").unlink()
    for flags in ([], ["--overwrite"], ["--overwrite", "--dtype", "float16"]):
        code, _, complaint = run(*words, *flags)
        assert code == 0, complaint
    assert find_foreign(tiny_zoo / "out") is None
    assert [path.name for path in tiny_zoo.iterdir() if path.name.startswith(".")] == []
    (tiny_zoo / "file").write_text("x")
    fails(run("merge", tiny_zoo / "a", "--base", tiny_zoo / "base", "--out", tiny_zoo / "file"), "is a file")


def test_overwriting_never_takes_an_input_or_the_working_directory_away(
    tiny_zoo: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["merge", tiny_zoo / "a", "--base", tiny_zoo / "base", "--method", "mean", "--overwrite", "--out"]
    for target in (tiny_zoo / "a", tiny_zoo / "base", tiny_zoo):
        fails(run(*words, target), "would be lost")
    (tiny_zoo / "b" / "README.md").write_text(card("../base"))
    by_card = ["merge", tiny_zoo / "b", "--method", "mean", "--overwrite", "--out", tiny_zoo / "base"]
    fails(run(*by_card), "base is not replaced.*no record")
    record = {"method": "mean", "models": [], "options": {}, "versions": {}}
    (tiny_zoo / "base" / "merge_config.json").write_text(json.dumps(record))
    fails(run(*by_card), "base, which would be lost")  # a merge of ours, but this one's base
    monkeypatch.chdir(tiny_zoo / "b")
    fails(run(*words, "."), "would be lost")
    assert contents(tiny_zoo) == ["a", "b", "base", "c"]


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_quantised_weights_are_no_weights(kind: torch.dtype, tiny_zoo: Path, run: Run) -> None:
    rewrite(tiny_zoo / "a", lambda s: [s.update({n: v.to(kind)}) for n, v in list(s.items())])
    refuse(tiny_zoo, run, "a: its weights are stored as", "--method", "mean")


@pytest.mark.parametrize("entry", [{"patch_size": 0}, {"hidden_size": "32"}, {"num_hidden_layers": None}])
def test_a_config_that_makes_no_sense(entry: dict[str, object], tiny_zoo: Path, run: Run) -> None:
    for folder in ("a", "b", "base"):
        content = json.loads((tiny_zoo / folder / "config.json").read_text()) | entry
        (tiny_zoo / folder / "config.json").write_text(json.dumps(content))
    refuse(tiny_zoo, run, f"{next(iter(entry))} in config.json is", "--method", "mean")


def test_an_overflow_in_the_written_dtype_is_an_error(tiny_zoo: Path, run: Run) -> None:
    rewrite(tiny_zoo / "a", lambda s: s[NAME].view(-1)[0].fill_(1e6))
    refuse(tiny_zoo, run, rf"{NAME}.*float16", "--method", "mean", "--dtype", "float16")


def test_what_is_there_instead_of_weights_is_listed(tiny_zoo: Path, run: Run) -> None:
    (tiny_zoo / "a" / "model.safetensors").rename(tiny_zoo / "a" / "model.fp16.safetensors")
    refuse(tiny_zoo, run, r"no model\.safetensors .*there is .*model\.fp16\.safetensors.*rename the variant")
    (tiny_zoo / "sub").mkdir()
    (tiny_zoo / "b").rename(tiny_zoo / "sub" / "image_encoder")
    refuse(tiny_zoo, run, r"no config\.json; there is image_encoder/; .*name that folder", models=("sub",))
    (tiny_zoo / "sub" / "open_clip_config.json").write_text("{}")
    refuse(
        tiny_zoo, run, r"open_clip_config\.json.*hf-epimer convert REF --out DIR. makes a CLIPModel", models=("sub",)
    )


def test_a_base_of_others_is_a_warning(tiny_zoo: Path, run: Run) -> None:
    rewrite(tiny_zoo / "b", lambda s: s.update({name: value + 9 for name, value in s.items()}))
    words = ("merge", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--method", "mean")
    code, _, complaint = run(*words, "--out", tiny_zoo / "out")
    assert code == 0
    assert re.search(r"^warning: b.* differs from the base base.* by more than its norm", complaint)
