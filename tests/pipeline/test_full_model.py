"""`--full`: a merge that transformers' zero-shot pipeline takes as it stands, and what it is refused for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from helpers.command import Run, contents, fails, strict
from helpers.data import CLASSES
from hf_epimer.evaluation.predict import predict
from hf_epimer.tasks.task import Task


def test_a_full_merge_is_a_zero_shot_classifier(clip_zoo: Path, tmp_path: Path, run: Run) -> None:
    words = ("--base", clip_zoo / "base", "--method", "mean")
    code, _, complaint = run("merge", clip_zoo / "a", clip_zoo / "b", *words, "--full", "--out", tmp_path / "full")
    assert (code, complaint) == (0, "")
    assert run("merge", clip_zoo / "a", clip_zoo / "b", *words, "--out", tmp_path / "tower")[0] == 0
    _, report = transformers.CLIPModel.from_pretrained(tmp_path / "full", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    full, tower = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "tower"))
    assert all(torch.equal(full[name], value) for name, value in tower.items())
    base = load_file(clip_zoo / "base" / "model.safetensors")
    rest = full.keys() - tower.keys()
    assert rest and all(torch.equal(full[name], base[name]) for name in rest)
    picture = Image.new("RGB", (8, 8), "red")
    classify = transformers.pipeline("zero-shot-image-classification", str(tmp_path / "full"))
    found = classify(picture, candidate_labels=list(CLASSES), hypothesis_template="{}")
    task = Task("any", "x", class_names=CLASSES, templates=("{}",))
    (expected,) = predict(str(tmp_path / "tower"), [picture], task, str(clip_zoo / "base"))
    assert {row["label"]: row["score"] for row in found} == pytest.approx(expected, abs=1e-4)
    card = (tmp_path / "full" / "README.md").read_text()
    assert "pipeline_tag: zero-shot-image-classification" in card
    assert 'pipeline("zero-shot-image-classification", "full")' in card and "load_state_dict" not in card
    assert strict(tmp_path / "full" / "merge_config.json")["full"] is True
    again = ("merge", "--config", tmp_path / "full" / "merge_config.json", "--out", tmp_path / "again")
    assert run(*again)[0] == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "full/model.safetensors").read_bytes()


def test_what_has_no_whole_model_is_refused_before_any_work(clip_zoo: Path, tmp_path: Path, run: Run) -> None:
    merge = ("merge", clip_zoo / "a", clip_zoo / "b", "--full", "--method", "mean", "--out", tmp_path / "out")
    alone = shutil.copytree(clip_zoo / "base", tmp_path / "base")
    for name in ("tokenizer.json", "vocab.json"):  # which of them there is depends on the release of transformers
        (alone / name).unlink(missing_ok=True)
    fails(run(*merge, "--base", alone), "--full: .* has no text tower or no tokenizer: name a whole model", 2)
    assert contents(tmp_path) == ["base"]
