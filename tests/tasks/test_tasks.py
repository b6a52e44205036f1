"""Tasks: the built-in benchmarks, task files with their errors, and how a checkpoint's task is guessed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_epimer.errors import TaskError
from hf_epimer.tasks.task import SUITES, Task, benchmark_tasks, find_task, infer_task, load_task_file

GOOD = {"name": "pets", "dataset": "org/pets", "class_names": ["cat", "dog"], "templates": ["a photo of a {}."]}


def write(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values), encoding="utf-8")
    return path


def test_twenty_benchmarks_with_their_class_counts() -> None:
    counts = {name: len(task.class_names or ()) for name, task in benchmark_tasks().items()}
    assert counts == {
        "sun397": 397, "stanford_cars": 196, "resisc45": 45, "eurosat": 10,
        "svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47,
        "oxford_flowers102": 102, "pcam": 2, "fer2013": 7, "oxford-iiit-pet": 37, "stl10": 10, "cifar100": 100,
        "cifar10": 10, "food101": 101, "fashion_mnist": 10, "emnist_letters": 26, "kmnist": 10, "rendered-sst2": 2,
    }  # fmt: skip
    assert [len(benchmark_tasks(size)) for size in SUITES] == [8, 14, 20]
    assert list(benchmark_tasks(8))[-1] == "dtd" and list(benchmark_tasks(14))[-1] == "cifar100"
    svhn = find_task("svhn")
    assert (svhn.dataset, svhn.config, svhn.templates) == (
        "ufldl-stanford/svhn", "cropped_digits", ('a photo of the number: "{}".',),
    )  # fmt: skip


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_task_file_is_read_with_defaults(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"pets{suffix}", GOOD)
    expected = Task("pets", "org/pets", class_names=("cat", "dog"), templates=("a photo of a {}.",))
    assert load_task_file(path) == find_task(path) == find_task(str(path)) == expected


def test_local_paths_start_at_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "head.safetensors").touch()
    values = {"name": "pets", "dataset": "../data", "head": "head.safetensors"}
    task = load_task_file(write(tmp_path / "tasks" / "pets.yaml", values))
    assert task.dataset == str(tmp_path / "data")
    assert task.head == str(tmp_path / "tasks" / "head.safetensors")
    elsewhere = load_task_file(write(tmp_path / "tasks" / "pets.yaml", GOOD))
    assert elsewhere.dataset == "org/pets"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"class_name": ["cat"]}, "unknown key 'class_name'"),
        ({"dataset": None}, "dataset"),
        ({"templates": []}, "templates"),
        ({"templates": ["a photo"]}, "a photo"),
        ({"class_names": [0, 1]}, "class_names"),
        ({"class_names": ["cat", "cat"]}, "class_names"),
        ({"class_names": "cat"}, "class_names"),
        ({"train_split": 3}, "train_split"),
    ],
)
def test_a_bad_key_is_named_with_its_file(tmp_path: Path, change: dict[str, object], named: str) -> None:
    path = write(tmp_path / "pets.yaml", GOOD | change)
    with pytest.raises(TaskError) as caught:
        load_task_file(path)
    assert str(path) in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize("text", ["name: [", "- a list", ""])
def test_a_file_that_is_no_mapping_is_an_error_of_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TaskError, match=r"broken\.yaml") as caught:
        load_task_file(path)
    assert "\n" not in str(caught.value)


def test_unknown_task_and_missing_file_are_told_apart() -> None:
    with pytest.raises(TaskError, match="known are sun397"):
        find_task("imagenet")
    with pytest.raises(TaskError, match="cannot be read"):
        find_task("nowhere.yaml")


@pytest.mark.parametrize(
    ("label", "datasets", "repo_name", "expected"),
    [
        ("dtd", ["ylecun/mnist"], "org/vit-svhn", "dtd"),
        ("stanford-cars", [], "", "stanford_cars"),
        ("something", ["ylecun/mnist"], "org/vit-svhn", None),
        (None, ["other/set", "ylecun/mnist"], "org/vit-svhn", "mnist"),
        (None, ["ylecun/mnist", "tanganke/dtd"], "org/vit-svhn", "svhn"),
        (None, [], "org/vit-b32-stanford-cars", "stanford_cars"),
        (None, [], "org/vit_b32_Stanford_Cars.v2", "stanford_cars"),
        (None, [], "org/vit-mnistlike", None),
        (None, [], "mnist/vit-b32", None),
    ],
)
def test_order_in_which_a_task_is_inferred(
    label: str | None, datasets: list[str], repo_name: str, expected: str | None
) -> None:
    task = infer_task(label, datasets, repo_name)
    assert (task.name if task else None) == expected


def test_the_longest_name_wins_among_given_tasks() -> None:
    tasks = {name: Task(name, f"org/{name}", templates=("{}",)) for name in ("cars", "stanford_cars", "stanford")}
    found = infer_task(repo_name="org/vit-stanford-cars", tasks=tasks)
    assert found is tasks["stanford_cars"]


def test_reading_tasks_does_not_load_heavy_libraries() -> None:
    heavy = ["torch", "transformers", "datasets"]
    code = "import importlib.util, sys; sys.path.insert(0, '.'); import hf_epimer.tasks.task as t; t.benchmark_tasks();"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
