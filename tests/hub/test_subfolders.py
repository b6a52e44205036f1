"""Checkpoints that lie in a subfolder of a repo, as those of a pipeline do: org/name@revision:subfolder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor

from helpers.command import Run, fails, strict
from helpers.data import write_data
from helpers.hub_server import StandInHub
from helpers.shards import language_model, read_shards, write_shards

PARTS = ("unet", "text_encoder")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def pipelines(empty_hub: StandInHub, tmp_path: Path) -> StandInHub:
    """org/base, org/a and org/b with a model in unet/ and another, of other tensors, in text_encoder/."""
    repos = tmp_path / "repos"
    for seed, part in enumerate(PARTS):
        base = language_model(seed)
        write_shards(repos / "base" / part, base, model_type=part)
        for more, name in enumerate(("a", "b"), start=10):
            write_shards(repos / name / part, language_model(seed + more, base), model_type=part)
    for name in ("a", "b"):
        (repos / name / "README.md").write_text("---\nbase_model: org/base\nlicense: mit\n---\n")
    for name in ("base", "a", "b"):
        empty_hub.add_repo(f"org/{name}", repos / name)
    return empty_hub


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_pipeline_merges_on_the_same_part_of_its_base(
    part: str, pipelines: StandInHub, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, base = (tmp_path / "repos" / name / part for name in ("a", "b", "base"))
    assert run("merge", a, b, "--base", base, "--method", "mean", "--out", "local")[0] == 0
    assert run("merge", f"org/a:{part}", f"org/b:{part}", "--method", "mean", "--out", "merged")[::2] == (0, "")
    assert same(read_shards(Path("merged")), read_shards(Path("local")))
    fetched = {request.path for request in pipelines.requests if "/resolve/" in request.path}
    assert all(f"/{part}/" in path or path.endswith("README.md") for path in fetched)
    assert "license: mit" in Path("merged/README.md").read_text()
    recipe = strict(Path("merged/merge_config.json"))
    assert recipe["base"].endswith(f":{part}") and all(model.endswith(f":{part}") for model in recipe["models"])
    # a merge of merges finds the part of the base that they were made on
    code, plan, _ = run("merge", "merged", f"org/a:{part}", "--method", "tsv-m", "--dry-run", "--json")
    assert code == 0 and recipe["base"] in plan
    # and the cache alone is enough for what has been pinned
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("merge", "--config", "merged/merge_config.json", "--out", "again")[0] == 0
    assert same(read_shards(Path("again")), read_shards(Path("merged")))


def test_a_subfolder_that_is_not_there(pipelines: StandInHub, run: Run) -> None:
    words = ("--base", "org/base:unet", "--method", "mean")
    said = "org/a:vae: there is no such folder in the repo, which has text_encoder, unet"
    fails(run("merge", "org/a:vae", "org/b:unet", *words), said)
    said = "if the checkpoint lies in a subfolder, name it, too: org/a:FOLDER"
    fails(run("merge", "org/a", "org/b", *words), said)


def test_towers_of_one_commit_are_not_taken_for_each_other(
    empty_hub: StandInHub, clip_zoo: Path, tmp_path: Path, run: Run
) -> None:
    """Neither of their statistics in the cache nor of their heads."""
    folders = [clip_zoo / name for name in ("base", "a", "b")]
    files = {f"{folder.name}/{file.name}": file for folder in folders for file in folder.iterdir()}
    empty_hub.add_repo("org/all", files)
    write_data(tmp_path / "data")
    Path("any.yaml").write_text("name: any\ndataset: data\ntemplates: ['a {}']\n")
    words = ("--task", "any.yaml", "--samples", "8")
    for name in ("a", "b"):
        there = run("fisher", f"org/all:{name}", "--base", "org/all:base", *words, "--out", f"{name}.safetensors")
        here = run("fisher", clip_zoo / name, "--base", clip_zoo / "base", *words, "--out", "local.safetensors")
        assert (there[0], here[0]) == (0, 0), there
        assert same(load_file(f"{name}.safetensors"), load_file("local.safetensors"))
    code, out, complaint = run("evaluate", "org/all:a", "--base", "org/all:base", "--task", "any.yaml", "--json")
    assert code == 0, complaint
    assert json.loads(out)["tasks"].keys() == {"any"}
    fails(run("fisher", "org/all:a", "--base", "org/all:base", *words, "--push"), "not to a subfolder: use --out", 2)
