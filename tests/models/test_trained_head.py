"""Classifiers that models were trained with: found, ordered, kept beside a merge, refused where they are damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.classifiers import load_classifier, source_of
from helpers.command import Run, contents, fails, strict
from helpers.data import CLASSES
from helpers.families import FAMILIES, TUNED, write_family
from helpers.hub_server import StandInHub
from hf_epimer.errors import CheckpointError, TaskError
from hf_epimer.evaluation.predict import predict
from hf_epimer.models.trained_head import heads_of, trained_head
from hf_epimer.models.vit import VIT
from hf_epimer.tasks.task import Task, load_task_file


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_family(tmp_path_factory.mktemp("vit"), FAMILIES["vit"])


@pytest.fixture
def model(zoo: Path, tmp_path: Path) -> Path:
    """One that may be damaged."""
    return shutil.copytree(zoo / "b", tmp_path / "b")


def rewrite(file: Path, **tensors: torch.Tensor | None) -> None:
    kept = {name: value for name, value in (load_file(file) | tensors).items() if value is not None}
    save_file(kept, file, metadata={"format": "pt"})


def rename(model: Path, names: dict[int, str] | None) -> None:
    config = json.loads((model / "config.json").read_text())
    config.pop("id2label")
    if names is not None:
        config["id2label"] = names
    (model / "config.json").write_text(json.dumps(config))


def test_rows_are_put_in_the_order_of_the_tasks_classes(
    model: Path, zoo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = load_task_file(zoo / "b.yaml")
    stored = load_file(model / "model.safetensors")["classifier.weight"]

    def rows() -> torch.Tensor:
        head = trained_head(source_of(model), VIT, task)
        assert head is not None
        return head.in_order_of(CLASSES, task)[0]

    assert torch.equal(rows(), stored.flip(0))
    rename(model, {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})  # nobody has named them
    assert torch.equal(rows(), stored)
    assert not caplog.messages
    rename(model, {0: "one", 1: "two", 2: "three"})
    assert torch.equal(rows(), stored)
    assert "its first class is called 'a', in the classifier that was trained for it 'one'" in caplog.messages[0]


def test_a_head_that_does_not_fit_is_refused(model: Path, zoo: Path) -> None:
    task = load_task_file(zoo / "b.yaml")
    file = model / "model.safetensors"
    with pytest.raises(TaskError, match="tells 3 classes apart, and task 'b' has 2"):
        load_classifier(model, zoo / "base", task, CLASSES[:2])
    rewrite(file, **{"classifier.weight": torch.ones(3, 15)})
    with pytest.raises(TaskError, match=r"rows have 15 numbers, the features of .* 16"):
        load_classifier(model, zoo / "base", task, CLASSES)
    rewrite(file, **{"classifier.weight": torch.full((3, 16), torch.nan)})
    with pytest.raises(CheckpointError, match="weight of its classifier"):
        load_classifier(model, zoo / "base", task, CLASSES)
    rewrite(file, **{"classifier.weight": None, "classifier.bias": None})
    with pytest.raises(CheckpointError, match="it has no linear layer"):
        load_classifier(model, zoo / "base", task, CLASSES)


def test_a_task_names_a_head_that_goes_before_the_models_own(model: Path, zoo: Path, tmp_path: Path) -> None:
    head = {"weight": torch.randn(3, 16), "bias": torch.randn(3)}
    save_file(head, tmp_path / "head.safetensors")
    classifier = load_classifier(model, zoo / "base", Task("b", "x", head=str(tmp_path / "head.safetensors")), CLASSES)
    assert torch.equal(classifier.head.get_buffer("weight"), head["weight"])


def test_a_merge_of_merges_keeps_all_classifiers(zoo: Path, tmp_path: Path, run: Run) -> None:
    names = [f"{name}={zoo / name}" for name in TUNED]
    words = ("--base", zoo / "base", "--method", "mean")
    assert run("merge", *names, *words, "--out", tmp_path / "one")[0] == 0
    assert run("merge", f"both={tmp_path / 'one'}", f"a={zoo / 'a'}", *words, "--out", tmp_path / "two")[0] == 0
    assert contents(tmp_path / "two" / "heads") == ["a-a.safetensors", "a.safetensors", "b.safetensors"]
    assert heads_of(source_of(tmp_path / "two"), VIT, None)["b"].class_names == CLASSES[::-1]


def test_predictions_need_no_base_where_the_model_has_all(zoo: Path) -> None:
    from PIL import Image

    (found,) = predict(str(zoo / "b"), [Image.new("RGB", (8, 8))], load_task_file(zoo / "b.yaml"))
    assert found.keys() == set(CLASSES)


def test_a_model_without_classifier_or_text_tower_needs_a_head(zoo: Path, model: Path, run: Run) -> None:
    rename(model, {})
    rewrite(model / "model.safetensors", **{"classifier.weight": None, "classifier.bias": None})
    result = run("evaluate", model, "--base", zoo / "base", "--task", zoo / "b.yaml")
    fails(result, "no text tower and no projection to classify 'b' with: give the task a head of its own")


def test_classifiers_are_pushed_with_the_weights_and_go_with_them(
    zoo: Path, tmp_path: Path, run: Run, empty_hub: StandInHub
) -> None:
    def pushed() -> set[str]:
        return {name for name in empty_hub.commits("org/merged")[0].files if name.startswith("heads/")}

    names = [f"{name}={zoo / name}" for name in TUNED]
    words = ("--base", zoo / "base", "--method", "mean", "--push-to", "org/merged")
    assert run("merge", *names, *words, "--out", tmp_path / "one")[0] == 0
    assert pushed() == {"heads/a.safetensors", "heads/b.safetensors"}
    code, out, complaint = run("evaluate", "org/merged", "--task", zoo / "b.yaml", "--json")
    assert code == 0, complaint
    assert json.loads(out)["tasks"].keys() == {"b"}
    assert run("merge", names[0], *words, "--out", tmp_path / "two")[0] == 0
    assert pushed() == {"heads/a.safetensors"}
    assert "heads/a.safetensors" in strict(tmp_path / "two" / "merge_config.json")["files"]
