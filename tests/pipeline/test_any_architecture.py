"""Models of no family that is known here: merged without data, from shards into shards, by rules that the plan says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers import reference
from helpers.command import Run, fails, strict
from helpers.hub_server import StandInHub
from helpers.shards import VOCABULARY, language_model, read_shards, write_shards
from hf_epimer.checkpoints.reader import WEIGHT_NAMES
from hf_epimer.checkpoints.writer import Shards
from hf_epimer.merging import average
from hf_epimer.pipeline import any_architecture

BASE = language_model(0)
TUNED = [language_model(seed, BASE) for seed in (1, 2)]
MATRICES = [name for name, tensor in BASE.items() if tensor.ndim in (2, 4) and "embed" not in name]
AVERAGED = [name for name in BASE if "norm" in name or "embed" in name]


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """base, a and b, in shards."""
    for name, tensors in zip(("base", "a", "b"), (BASE, *TUNED), strict=True):
        write_shards(tmp_path / name, tensors)
    return tmp_path


def words(zoo: Path, *more: object) -> list[object]:
    return ["merge", zoo / "a", zoo / "b", "--base", zoo / "base", *more]


def expected(method: str) -> dict[str, Tensor]:
    """Every matrix by a method's float64 reference."""
    flat = [{name: state[name].double().flatten(1) for name in MATRICES} for state in (BASE, *TUNED)]
    if method == "ties":
        merged = reference.ties([list(state.values()) for state in flat[1:]], list(flat[0].values()))
        return dict(zip(MATRICES, merged, strict=True))
    one: Callable[..., Any] = {
        "tsv-m": reference.tsv_m,
        "iso-c": reference.iso_c,
        "mean": lambda base, tuned: sum(tuned) / len(tuned),
    }[method]
    return {name: one(flat[0][name], [state[name] for state in flat[1:]]) for name in MATRICES}


@pytest.mark.parametrize("method", ["tsv-m", "iso-c", "ties", "mean"])
def test_every_tensor_is_merged_as_the_references_say(
    zoo: Path, run: Run, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(any_architecture, "Shards", partial(Shards, max_shard_bytes=3000))
    monkeypatch.setattr(average, "PIECE", 100)
    code, _, complaint = run(*words(zoo, "--method", method, "--dtype", "float32", "--out", zoo / "out"))
    assert (code, complaint) == (0, "")
    found = read_shards(zoo / "out")
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in BASE.items()}
    for name, wanted in expected(method).items():
        base = BASE[name].double().flatten(1)
        assert reference.relative_error(found[name].flatten(1), wanted, base) < 1e-4, name
    for name in AVERAGED:
        mean = sum(state[name].double() for state in TUNED) / 2
        assert reference.relative_error(found[name], mean, BASE[name].double()) < 1e-5, name
    assert torch.equal(found["model.steps"], BASE["model.steps"])
    index = json.loads((zoo / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == BASE.keys()
    assert len(set(index["weight_map"].values())) > 2
    report = json.loads((zoo / "out" / "merge_report.json").read_text())
    assert report["layers"][0]["task_vector_norms"] and len(report["layers"]) == len(MATRICES) + len(AVERAGED)


def test_a_merge_is_a_model_of_its_base(zoo: Path, run: Run) -> None:
    (zoo / "base" / "config.json").write_text(
        json.dumps(json.loads((zoo / "base" / "config.json").read_text()) | {"_name_or_path": "/home/ann/secret"})
    )
    assert run(*words(zoo, "--method", "mean", "--out", zoo / "out"))[0] == 0
    assert {tensor.dtype for name, tensor in read_shards(zoo / "out").items() if name != "model.steps"} == {
        torch.bfloat16
    }
    config = json.loads((zoo / "out" / "config.json").read_text())
    assert config["model_type"] == "tiny-lm" and config["dtype"] == "bfloat16" and "_name_or_path" not in config
    assert (zoo / "out" / "tokenizer.json").read_text() == (zoo / "base" / "tokenizer.json").read_text()
    card = (zoo / "out" / "README.md").read_text()
    assert "from transformers import AutoTokenizer, TinyForCausalLM" in card
    assert "| by the mean | `model.embed_tokens.weight`" in card and "vision" not in card
    again = ["merge", "--config", zoo / "out" / "merge_config.json", "--out", zoo / "again"]
    assert run(*again)[0] == 0
    assert (zoo / "again" / "model.safetensors").read_bytes() == (zoo / "out" / "model.safetensors").read_bytes()


def test_what_sentence_transformers_makes_of_a_base_it_makes_of_a_merge(zoo: Path, run: Run) -> None:
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]
    beside = {"modules.json": modules, "sentence_bert_config.json": {}, "1_Pooling/config.json": {"pooling": "mean"}}
    (zoo / "base" / "1_Pooling").mkdir()
    for name, content in beside.items():
        (zoo / "base" / name).write_text(json.dumps(content))
    assert run(*words(zoo, "--method", "mean", "--out", zoo / "out"))[0] == 0
    assert {name: json.loads((zoo / "out" / name).read_text()) for name in beside} == beside
    (zoo / "base" / "1_Pooling").rename(zoo / "elsewhere")
    (zoo / "base" / "1_Pooling").symlink_to(zoo / "elsewhere")
    refused = run(*words(zoo, "--method", "mean", "--out", zoo / "again"))
    fails(refused, "1_Pooling/config.json is a link out of the folder")


def test_transformers_loads_a_merge_with_nothing_missing(tmp_path: Path, run: Run) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name in ("base", "a", "b"):
        model.save_pretrained(tmp_path / name)
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.ones_like(parameter).bernoulli(generator=torch.Generator().manual_seed(1))
    (tmp_path / "base" / "README.md").write_text("---\npipeline_tag: text-generation\n---\n")
    assert run(*words(tmp_path, "--out", tmp_path / "out"))[0] == 0  # by the default method
    _, told = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert "pipeline_tag: text-generation" in (tmp_path / "out" / "README.md").read_text()


def test_the_plan_says_what_becomes_of_every_tensor(zoo: Path, run: Run) -> None:
    plan = json.loads(run(*words(zoo, "--method", "tsv-m", "--skip", "*.0.attn.*", "--dry-run", "--json"))[1])
    assert plan["by_the_method"] == [
        "model.conv.weight",
        "model.layers.*.mlp.down.weight (2)",
        "model.layers.*.mlp.up.weight (2)",
        "model.layers.1.attn.k.weight",
        "model.layers.1.attn.q.weight",
    ]
    assert plan["by_the_mean"] == ["model.embed_tokens.weight", "model.layers.*.norm.weight (2)", "model.norm.weight"]
    assert plan["as_in_the_base"] == [
        "model.layers.0.attn.k.weight",
        "model.layers.0.attn.q.weight",
        "model.steps",
    ]
    assert not (zoo / "merged-tsv-m").exists()
    assert run(*words(zoo, "--method", "tsv-m", "--skip", "*.0.attn.*", "--out", zoo / "out"))[0] == 0
    found = read_shards(zoo / "out")
    kept = [name for name in BASE if ".0.attn." in name]
    assert len(kept) == 2 and all(torch.equal(found[name], BASE[name]) for name in kept)


def test_classifiers_of_unlike_classes_stay_as_in_the_base(zoo: Path, run: Run) -> None:
    def with_classes(name: str, tensors: dict[str, Tensor], count: int, first: str = "cat") -> None:
        shutil.rmtree(zoo / name)
        head = {"classifier.weight": torch.full((count, 16), float(count)), "classifier.bias": torch.zeros(count)}
        names = {str(number): f"{first} {number}" for number in range(count)}
        write_shards(zoo / name, tensors | head, id2label=names)

    with_classes("base", BASE, 5)
    with_classes("a", TUNED[0], 3)
    merge = words(zoo, "--method", "mean", "--out", zoo / "out")
    fails(run(*merge), r"b: .*missing classifier.bias|a: it tells 3 classes apart, the base 5 \(classifier\.weight\)")
    assert run(*merge, "--skip", "classifier.*")[0] == 0  # b has none at all
    found = read_shards(zoo / "out")
    assert torch.equal(found["classifier.weight"], torch.full((5, 16), 5.0))
    name = MATRICES[0]
    mean = sum(state[name].double() for state in TUNED) / 2
    assert reference.relative_error(found[name], mean, BASE[name].double()) < 0.05  # bfloat16
    # and what the base does not have is left out
    write_shards(zoo / "bare", BASE)
    assert (
        run("merge", zoo / "a", zoo / "b", "--base", zoo / "bare", *merge[5:-1], zoo / "more", "--skip", "classif*")[0]
        == 0
    )
    assert read_shards(zoo / "more").keys() == BASE.keys()
    # as many classes, but others
    with_classes("a", TUNED[0], 5)
    with_classes("b", TUNED[1], 5, "dog")
    code, _, complaint = run(*merge[:-1], zoo / "mixed")
    assert code == 0 and "the mean of their classifiers says nothing; --skip 'classifier.*' leaves" in complaint


def test_code_of_a_models_own_is_neither_run_nor_copied(zoo: Path, empty_hub: StandInHub, run: Run) -> None:
    auto_map = {"AutoModel": "modeling_x.XModel", "AutoTokenizer": ["x.Slow", None], "AutoConfig": "org/y--x.XConfig"}
    (zoo / "base" / "modeling_x.py").write_text("raise SystemExit('was run')")
    config = strict(zoo / "base" / "config.json") | {"auto_map": auto_map}
    (zoo / "base" / "config.json").write_text(json.dumps(config))
    code, _, complaint = run(*words(zoo, "--method", "mean", "--out", zoo / "out"))
    assert code == 0 and "brings code of its own" in complaint and "copy it beside the merge" in complaint
    assert strict(zoo / "out" / "config.json")["auto_map"] == auto_map and not list((zoo / "out").glob("*.py"))
    empty_hub.add_repo("org/base", zoo / "base")
    merge = ("merge", zoo / "a", zoo / "b", "--base", "org/base", "--method", "mean", "--out", zoo / "hub")
    code, _, complaint = run(*merge)
    assert code == 0 and "who loads the merge with trust_remote_code gets it there" in complaint
    assert strict(zoo / "hub" / "config.json")["auto_map"] == {
        "AutoModel": "org/base--modeling_x.XModel",
        "AutoTokenizer": ["org/base--x.Slow", None],
        "AutoConfig": "org/y--x.XConfig",
    }
    assert not any("modeling_x.py" in request.path for request in empty_hub.requests)


def test_siglip_2_at_native_resolutions_merges_without_data(tmp_path: Path, run: Run) -> None:
    """Its pictures are cut to patches of any number and shape, so that no family here describes its forward pass."""
    import transformers

    if not hasattr(transformers, "Siglip2VisionModel"):
        pytest.skip("transformers has no SigLIP 2 yet")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**size, num_patches=16, patch_size=4))
    for name in ("base", "a", "b"):
        model.save_pretrained(tmp_path / name)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    assert run(*words(tmp_path, "--method", "tsv-m", "--out", tmp_path / "out"))[0] == 0
    _, told = transformers.Siglip2VisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    refused = run(*words(tmp_path, "--method", "fisher", "--out", tmp_path / "measured"))
    fails(refused, r"siglip2_vision_model model\): it merges without data, by .*tsv-m", 2)


@pytest.mark.parametrize("stores", ["base", "a"])
def test_a_head_that_is_the_embedding_may_be_stored_or_not(zoo: Path, run: Run, stores: str) -> None:
    tensors = {"base": BASE, "a": TUNED[0]}[stores]
    shutil.rmtree(zoo / stores)
    write_shards(zoo / stores, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    plan = json.loads(run(*words(zoo, "--method", "tsv-m", "--dry-run", "--json"))[1])
    assert plan["tied"] == ["lm_head.weight is model.embed_tokens.weight"]
    assert run(*words(zoo, "--method", "tsv-m", "--out", zoo / "out"))[0] == 0
    found = read_shards(zoo / "out")
    assert ("lm_head.weight" in found) == (stores == "base")
    assert torch.equal(
        found.get("lm_head.weight", found["model.embed_tokens.weight"]), found["model.embed_tokens.weight"]
    )


def test_what_does_not_fit_is_said_before_a_weight_is_read(zoo: Path, run: Run) -> None:
    larger = language_model(3, vocabulary=VOCABULARY + 1)
    write_shards(zoo / "larger", larger, vocab_size=VOCABULARY + 1)
    merge = ["merge", zoo / "a", zoo / "larger", "--base", zoo / "base", "--method", "mean", "--out", zoo / "out"]
    fails(run(*merge), r"larger.*: its vocabulary has 41 tokens, the base's 40 \(model\.embed_tokens\.weight\)")
    write_shards(zoo / "other", BASE | {"model.more.weight": torch.ones(2, 2)})
    fails(run("merge", zoo / "other", "--base", zoo / "base", "--method", "mean"), "unexpected model.more.weight")
    write_shards(zoo / "kind", BASE, model_type="other-lm")
    fails(
        run("merge", zoo / "kind", "--base", zoo / "base", "--method", "mean"),
        "is a other-lm model, the base .* tiny-lm",
    )
    write_shards(zoo / "packed", BASE | {"model.norm.weight": BASE["model.norm.weight"].to(torch.int8)})
    fails(run("merge", zoo / "packed", "--base", zoo / "base", "--method", "mean"), "quantised")
    fails(run(*words(zoo, "--skip", "nothing*")), "--skip 'nothing\\*' fits no tensor", 2)
    assert not (zoo / "out").exists()


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--method", "fisher"], "merges without data, by .*tsv-m.*; fisher needs statistics"),
        (["--method", "mean", "--calibrate"], "--calibrate is for families"),
        (["--method", "mean", "--evaluate"], "its task must be known|--evaluate is for families"),
    ],
)
def test_what_needs_data_is_refused(zoo: Path, run: Run, more: list[object], complaint: str) -> None:
    fails(run(*words(zoo, *more, "--out", zoo / "out")), complaint, 2)


def test_other_commands_know_families_only(zoo: Path, run: Run) -> None:
    fails(run("diagnose", zoo / "a", zoo / "b", "--base", zoo / "base"), "model type 'tiny-lm'")
    fails(run("evaluate", zoo / "a", "--base", zoo / "base", "--task", "dtd"), "model type 'tiny-lm'")


def test_adapters_have_to_be_folded_first(zoo: Path, run: Run) -> None:
    (zoo / "lora").mkdir()
    (zoo / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    save_file(
        {"base_model.model.model.norm.lora_A.weight": torch.ones(2, 16)}, zoo / "lora" / "adapter_model.safetensors"
    )
    merge = ("merge", zoo / "a", zoo / "lora", "--base", zoo / "base", "--method", "mean", "--out", zoo / "out")
    fails(run(*merge), r"fold the adapter .*lora into it first \(PEFT's merge_and_unload\)", 2)


def test_damaged_files_of_the_base_leave_nothing(zoo: Path, run: Run) -> None:
    (zoo / "base" / "tokenizer.json").write_text("{")
    fails(run(*words(zoo, "--method", "mean", "--out", zoo / "out")), "tokenizer.json is not readable JSON")
    (zoo / "base" / "tokenizer.json").unlink()
    (zoo / "base" / "tokenizer.json").symlink_to("/etc/hostname")
    fails(run(*words(zoo, "--method", "mean", "--out", zoo / "out")), "tokenizer.json is a link out of the folder")
    (zoo / "base" / "tokenizer.json").unlink()
    shutil.rmtree(zoo / "b")
    write_shards(zoo / "b", TUNED[1] | {"model.layers.1.mlp.up.weight": torch.full((24, 16), torch.nan).bfloat16()})
    fails(
        run(*words(zoo, "--method", "mean", "--out", zoo / "out")),
        r"b: NaN or Inf in model\.layers\.1\.mlp\.up\.weight",
    )
    shutil.rmtree(zoo / "b")
    write_shards(zoo / "b", BASE)
    fails(run(*words(zoo, "--method", "mean", "--out", zoo / "out")), "every tensor equals the base's")
    assert not (zoo / "out").exists()


def test_the_layout_of_diffusers(tmp_path: Path, run: Run) -> None:
    for name, tensors in zip(("base", "a", "b"), (BASE, *TUNED), strict=True):
        write_shards(tmp_path / name, tensors, WEIGHT_NAMES[1])
        (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    assert run(*words(tmp_path, "--method", "mean", "--out", tmp_path / "out"))[0] == 0
    assert read_shards(tmp_path / "out").keys() == BASE.keys()
    assert (tmp_path / "out" / WEIGHT_NAMES[1]).is_file()
    assert "from diffusers import UNet2DConditionModel\n" in (tmp_path / "out" / "README.md").read_text()


def test_a_plan_for_the_hub_reads_headers_only(zoo: Path, empty_hub: StandInHub, run: Run) -> None:
    for name in ("base", "a", "b"):
        empty_hub.add_repo(f"org/{name}", zoo / name)
    merge = ["merge", "org/a", "org/b", "--base", "org/base", "--method", "tsv-m"]
    code, output, _ = run(*merge, "--dry-run", "--json")
    assert code == 0 and "model.conv.weight" in json.loads(output)["by_the_method"]
    read = [request for request in empty_hub.requests if ".safetensors" in request.path and request.method == "GET"]
    assert read and all("Range" in request.headers or request.path.endswith(".json") for request in read)
    assert run(*merge, "--push-to", "org/merged")[0] == 0
    files = set(empty_hub.commits("org/merged")[0].files)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files


@pytest.mark.slow
def test_two_processes_write_what_one_does(zoo: Path, run: Run) -> None:
    method = "ties"  # which looks at all layers before it merges one
    for name, license in (("a", "mit"), ("b", "apache-2.0")):
        (zoo / name / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    assert run(*words(zoo, "--method", method, "--out", zoo / "one"))[0] == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hf_epimer"]
    done = subprocess.run(
        [*launcher, *map(str, words(zoo, "--method", method, "--out", zoo / "two", "--json"))],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(zoo / "two")
    assert done.stderr.count("warning: different licenses (mit: a; apache-2.0: b)") == 1, done.stderr
    assert (zoo / "two" / "model.safetensors").read_bytes() == (zoo / "one" / "model.safetensors").read_bytes()
    one, two = (json.loads((zoo / name / "merge_report.json").read_text())["layers"] for name in ("one", "two"))
    assert one == two
