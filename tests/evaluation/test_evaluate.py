"""`hf-epimer evaluate`: counts, intervals, processes, heads from the cache, and what it writes."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers.classifiers import load_classifier, zero_shot_rows
from helpers.command import Run
from helpers.data import CLASSES, write_benchmark
from helpers.docs_hub import write_base
from helpers.hub_server import StandInHub
from hf_epimer import ModelRef, evaluate
from hf_epimer.errors import UsageError
from hf_epimer.evaluation import accuracy as measuring
from hf_epimer.evaluation.accuracy import TopOne, evaluate_folder
from hf_epimer.evaluation.results import TaskResult, wilson
from hf_epimer.models import head as heads
from hf_epimer.models.classifier import Classifier
from hf_epimer.models.source import resolve_model
from hf_epimer.tasks.images import read_samples
from hf_epimer.tasks.task import benchmark_tasks, load_task_file
from hf_epimer.types import Precision

pytestmark = pytest.mark.usefixtures("own_home")


def words(zoo: Path, *tasks: str) -> list[object]:
    return ["evaluate", zoo / "a", "--base", zoo / "base", "--task", *(zoo / f"{name}.json" for name in tasks or "ab")]


def by_hand(zoo: Path, name: str, split: str = "test") -> tuple[list[int], list[int]]:
    """Guesses and labels, one image at a time."""
    task = load_task_file(zoo / f"{name}.json")
    samples = read_samples(task, split)
    model = load_classifier(zoo / "a", zoo / "base", task, CLASSES)
    import datasets

    rows = datasets.load_dataset(task.dataset, split=split)
    guesses = []
    with torch.inference_mode():
        for row in rows:
            assert isinstance(row["image"], Image.Image)
            guesses.append(int(model(model.pixels([row["image"]])).argmax()))
    assert len(samples) == len(guesses)
    return guesses, list(rows["label"])


def test_results_are_those_of_one_image_after_the_other(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    code, output, complaint = run(*words(clip_zoo), "--out", "results.json", "--batch-size", 7)
    assert (code, complaint) == (0, "")
    assert "average" in output and "worst" in output
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["model"] == "a" and found["base"] == "base"
    shares = []
    for name in "ab":
        guesses, labels = by_hand(clip_zoo, name)
        correct = sum(guess == label for guess, label in zip(guesses, labels, strict=True))
        row = found["tasks"][name]
        assert (row["correct"], row["samples"]) == (correct, 40)
        assert row["accuracy"] == correct / 40
        assert row["interval"] == pytest.approx(list(wilson(correct, 40)))
        shares.append(correct / 40)
    assert len(set(shares)) == 2  # otherwise average and worst would mean little
    assert found["average"] == pytest.approx(sum(shares) / 2)
    assert found["worst"] == {"task": "ab"[shares.index(min(shares))], "accuracy": min(shares)}


def test_json_limit_split_and_per_class(clip_zoo: Path, run: Run) -> None:
    code, output, _ = run(*words(clip_zoo, "a"), "--limit", 9, "--split", "train", "--json", "--per-class")
    assert code == 0
    row = json.loads(output)["tasks"]["a"]
    guesses, labels = (part[:9] for part in by_hand(clip_zoo, "a", "train"))
    assert row["samples"] == 9
    for index, name in enumerate(CLASSES):
        own = [guess == label for guess, label in zip(guesses, labels, strict=True) if label == index]
        assert row["per_class"][name] == (sum(own) / len(own) if own else None)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_results_say_which_precision_they_were_measured_in(
    clip_zoo: Path, run: Run, monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool
) -> None:
    asked: list[str] = []
    top1 = Classifier.top1

    def noted(model: Classifier, pixels: torch.Tensor, precision: Precision = "no") -> torch.Tensor:
        asked.append(precision)
        return top1(model, pixels, precision)

    monkeypatch.setattr(Classifier, "top1", noted)
    monkeypatch.setattr(measuring, "has_bfloat16", lambda device: has_bfloat16)
    found = {}
    for given in ("no", "bf16", None):
        asked.clear()
        more = ["--mixed-precision", given] if given else []
        found[given] = json.loads(run(*words(clip_zoo, "a"), "--json", *more)[1])
        assert {found[given]["mixed_precision"]} == set(asked)
    assert (found["no"]["mixed_precision"], found["bf16"]["mixed_precision"]) == ("no", "bf16")
    assert found["no"]["tasks"] == found["bf16"]["tasks"]
    assert found[None] == found["bf16" if has_bfloat16 else "no"]
    with pytest.raises(UsageError, match="--mixed-precision must be no or bf16, not fp16"):
        evaluate(str(clip_zoo / "a"), [str(clip_zoo / "a.json")], precision="fp16")  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_processes_count_what_one_does(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    arguments = [*words(clip_zoo), "--limit", 23, "--batch-size", 4]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "two")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hf_epimer"]
    done = subprocess.run([*launcher, *map(str, arguments), "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    assert two == json.loads(run(*arguments, "--json")[1])
    assert two["tasks"]["a"]["samples"] == 23


def test_wilsons_interval() -> None:
    for correct, samples in ((0, 10), (10, 10), (7, 10), (690, 1000)):
        low, high = wilson(correct, samples)
        assert 0 <= low <= correct / samples <= high <= 1
        for bound in (low, high):  # the ends solve (p - k/N)^2 = z^2 p (1 - p) / N
            if 0 < bound < 1:
                assert (bound - correct / samples) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / samples)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


def test_the_metric_counts_confusions() -> None:
    found = TopOne(keep_in_memory=True).compute(predictions=[0, 1, 2, 1], references=[0, 1, 1, 2], classes=3)
    assert found == {"correct": 2, "samples": 4, "confusion": [[1, 0, 0], [0, 1, 1], [0, 1, 0]]}
    row = TaskResult(2, 4, ("x", "y", "z"), ((1, 0, 0), (0, 1, 1), (0, 1, 0)))
    assert row.per_class() == {"x": 1.0, "y": 0.5, "z": 0.0}


def test_normalised_by_the_fine_tuned_models(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    run(*words(clip_zoo, "a"), "--out", "a.json")
    own = json.loads((tmp_path / "a.json").read_text())
    own["tasks"]["a"]["accuracy"] *= 2
    (tmp_path / "a.json").write_text(json.dumps(own))
    found = json.loads(run(*words(clip_zoo), "--fine-tuned", "a.json", "--json")[1])
    assert found["tasks"]["a"]["normalized"] == pytest.approx(0.5)
    assert "normalized" not in found["tasks"]["b"] and "normalized_average" not in found
    found = json.loads(run(*words(clip_zoo, "a"), "--fine-tuned", "a.json", "--json")[1])
    assert found["normalized_average"] == pytest.approx(0.5)
    (tmp_path / "bad.json").write_text("[]")
    code, _, complaint = run(*words(clip_zoo), "--fine-tuned", "bad.json")
    assert code == 2 and "not a results.json" in complaint


def test_the_card_gets_the_accuracies(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(clip_zoo / "a", tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    arguments: list[object] = ["evaluate", tmp_path / "mine", *words(clip_zoo)[2:]]
    for _ in range(2):  # a second time replaces, and does not repeat
        assert run(*arguments, "--update-card")[0] == 0
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.license == "mit" and "# Mine" in card.text
    measured = {entry.dataset_name: entry.metric_value for entry in card.data.eval_results or []}
    results = evaluate(ModelRef(str(tmp_path / "mine")), [str(clip_zoo / "a.json"), str(clip_zoo / "b.json")],
                       str(clip_zoo / "base"))  # fmt: skip
    assert measured == {task: round(row.accuracy, 4) for task, row in results.tasks.items()}
    assert str(clip_zoo) not in (tmp_path / "mine" / "README.md").read_text()


def test_confusion_pictures(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    assert run(*words(clip_zoo), "--confusion", "pictures")[0] == 0
    for name in "ab":
        with Image.open(tmp_path / "pictures" / f"{name}.png") as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(10**6) or []) > 10


def test_a_head_is_made_once(clip_zoo: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [load_task_file(clip_zoo / f"{name}.json") for name in "ab"]
    made: list[object] = []
    original = heads.text_head
    monkeypatch.setattr(heads, "text_head", lambda *a: made.append(a) or original(*a))
    first = evaluate_folder(clip_zoo / "a", clip_zoo / "base", tasks, name="a")
    assert len(made) == len(list((own_home / "heads").iterdir())) == 2
    second = evaluate_folder(clip_zoo / "b", clip_zoo / "base", tasks, name="b")
    assert len(made) == 2
    assert first.tasks.keys() == second.tasks.keys()
    # other templates, other class names or another base make another head; a damaged file is made again
    source = resolve_model(ModelRef(str(clip_zoo / "base")))
    heads.base_parts(source, tasks[0], ("b", "a", "ab"))
    heads.base_parts(source, load_with(tasks[0], templates=("{}",)), CLASSES)
    assert len(made) == 4
    for file in (own_home / "heads").iterdir():
        file.write_bytes(b"damaged")
    parts = heads.base_parts(source, tasks[0], CLASSES)
    torch.testing.assert_close(parts["head"], zero_shot_rows(clip_zoo / "base", CLASSES, tasks[0].templates))


def load_with(task: object, **changes: object) -> object:
    return type(task)(**{**vars(task), **changes})


def test_a_tasks_own_head(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    task = json.loads((clip_zoo / "a.json").read_text())
    task |= {"dataset": str(clip_zoo / "data" / "a"), "head": "head.safetensors"}
    del task["templates"]
    (tmp_path / "own.json").write_text(json.dumps(task))
    zero_shot = zero_shot_rows(clip_zoo / "base", CLASSES, ("{} b.", "a {}"))
    save_file({"weight": zero_shot}, tmp_path / "head.safetensors")
    arguments: list[object] = [*words(clip_zoo)[:4], "--task", "own.json", "--json"]
    same = json.loads(run(*arguments)[1])["tasks"]["a"]
    assert same == json.loads(run(*words(clip_zoo, "a"), "--json")[1])["tasks"]["a"]
    save_file({"weight": zero_shot[[1, 2, 0]].contiguous()}, tmp_path / "head.safetensors")
    assert json.loads(run(*arguments)[1])["tasks"]["a"] != same


@pytest.mark.parametrize(
    ("more", "pattern", "code"),
    [
        (["--limit", "0"], "--limit must be at least 1", 2),
        (["--batch-size", "0"], "--batch-size must be at least 1", 2),
        (["--split", "nowhere"], "nowhere", 1),
        (["--task", "nothing"], "no task is called 'nothing'", 1),
        (["--out", "."], "is a folder, not a file", 1),
    ],
)
def test_wrong_words(more: list[str], pattern: str, code: int, clip_zoo: Path, run: Run) -> None:
    found, output, complaint = run(*words(clip_zoo), *more)
    assert (found, output) == (code, ""), complaint
    assert complaint.startswith("error: ") and complaint.count("\n") == 1
    assert re.search(pattern, complaint), complaint


def test_a_task_twice_and_a_base_without_text(clip_zoo: Path, tiny_zoo: Path, run: Run) -> None:
    assert "each of them once" in run(*words(clip_zoo, "a", "a"))[2]
    found = run("evaluate", tiny_zoo / "a", "--base", tiny_zoo / "base", "--task", clip_zoo / "a.json")
    assert found[0] == 1 and "no text tower" in found[2]
    assert "--update-card writes into a local folder" in run("evaluate", "org/x", "--task", "dtd", "--update-card")[2]


def test_the_merged_folders_results_are_those_of_evaluate(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    tasks = [clip_zoo / "a.json", clip_zoo / "b.json"]
    models = [f"{name}={clip_zoo / name}" for name in "ab"]
    merge = ["merge", *models, "--base", clip_zoo / "base", "--method", "mean", "--task", *tasks]
    assert run(*merge, "--evaluate", "--out", "merged")[0] == 0
    inside = json.loads((tmp_path / "merged" / "results.json").read_text())
    again = json.loads(run("evaluate", "merged", "--base", clip_zoo / "base", "--task", *tasks, "--json")[1])
    assert inside["tasks"] == again["tasks"] and inside["average"] == again["average"]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "95% interval" in card and math.isfinite(inside["average"])
    assert len(load_file(tmp_path / "merged" / "model.safetensors")) > 30


@pytest.mark.slow
def test_all_twenty_benchmarks_come_from_the_hub(clip_zoo: Path, tmp_path: Path) -> None:
    """Small parquet repos of the same schema, in a process of its own: ids, configs, splits, columns, class counts."""
    tasks = benchmark_tasks()
    with StandInHub() as stand_in:
        stand_in.add_repo("org/base", write_base(tmp_path / "src" / "base"))
        stand_in.add_repo("org/tuned", clip_zoo / "a")
        for name, task in tasks.items():
            stand_in.add_repo(task.dataset, write_benchmark(tmp_path / "src" / name, task), repo_type="dataset")
        environment = {**os.environ, "HF_ENDPOINT": stand_in.url, "HF_HOME": str(tmp_path / "home")}
        arguments = ["evaluate", "org/tuned", "--base", "org/base", "--suite", "20", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "hf_epimer", *arguments], capture_output=True, text=True, env=environment
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["tasks"].keys() == tasks.keys()
    assert {row["samples"] for row in found["tasks"].values()} == {12}


def test_a_head_that_cannot_be_kept_leaves_nothing(
    clip_zoo: Path, run: Run, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(heads, "save_file", full)
    code, _, complaint = run(*words(clip_zoo))
    assert code == 1 and "cannot write" in complaint and "No space left" in complaint
    assert list((own_home / "heads").iterdir()) == []
