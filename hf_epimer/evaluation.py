"""Top-1 accuracy of a classifier on a split of a task's data set.

    accuracy = |{ i : argmax_c logits_c(x_i) = y_i }| / N

The data are read with `datasets.load_dataset` from the Hub or from a local folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from hf_epimer.classifier import Classifier, load_classifier, task_head
from hf_epimer.errors import DataError
from hf_epimer.tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Accuracy:
    """How many of how many samples were classified correctly."""

    correct: int
    samples: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.samples


def read_split(task: Task, split: str, limit: int | None = None) -> Dataset:
    """The first `limit` rows (all, if None) of a split, with the task's image and label columns known to exist."""
    from datasets import load_dataset

    try:
        data = load_dataset(task.dataset, task.config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{task.dataset}, split {split!r} of task {task.name!r}: {first_line}") from error
    for column in (task.image_column, task.label_column):
        if column not in data.column_names:
            raise DataError(f"{task.dataset}: no column {column!r} for task {task.name!r}; it has {data.column_names}")
    data = data if limit is None else data.select(range(min(limit, len(data))))
    if not len(data):
        raise DataError(f"{task.dataset}: split {split!r} of task {task.name!r} has no samples to use")
    return data


def class_names_of(task: Task, data: Dataset) -> tuple[str, ...]:
    """The task's class names, by default those stored with the labels; they must agree in number."""
    stored = getattr(data.features[task.label_column], "names", None)
    if task.class_names is None and stored is None:
        raise DataError(f"{task.dataset}: the labels carry no names; give class_names for task {task.name!r}")
    names = task.class_names or tuple(stored or ())
    if stored is not None and len(stored) != len(names):
        raise DataError(f"task {task.name!r} names {len(names)} classes, the labels of {task.dataset} {len(stored)}")
    return names


@torch.inference_mode()
def accuracy(model: Classifier, task: Task, split: str, limit: int | None = None, batch_size: int = 64) -> Accuracy:
    """Classify a split and count the hits."""
    data = read_split(task, split, limit)
    classes = len(class_names_of(task, data))
    if classes != len(model.head):
        raise DataError(f"task {task.name!r} has {classes} classes, the head of the classifier {len(model.head)}")
    correct = 0
    for batch in data.iter(batch_size=batch_size):
        labels = torch.tensor(batch[task.label_column])
        outside = labels[(labels < 0) | (labels >= classes)]
        if len(outside):
            raise DataError(f"{task.dataset}: label {int(outside[0])}, but task {task.name!r} has {classes} classes")
        guesses = model(model.pixels(batch[task.image_column])).argmax(-1)
        correct += int((guesses.cpu() == labels).sum())
    return Accuracy(correct, len(data))


def evaluate_folder(
    folder: str | Path,
    base_folder: str | Path,
    tasks: Sequence[Task],
    *,
    name: str,
    base_name: str,
    on_task: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Test accuracy of one checkpoint on several tasks: the contents of results.json, and `datasets` for the card."""
    rows: dict[str, dict[str, Any]] = {}
    for task in tasks:
        names = class_names_of(task, read_split(task, task.test_split, limit=1))
        found = accuracy(
            load_classifier(folder, base_folder, task_head(task, base_folder, names)), task, task.test_split
        )
        rows[task.name] = {"accuracy": found.accuracy, "correct": found.correct, "samples": found.samples}
        on_task()
    worst = min(rows, key=lambda task: rows[task]["accuracy"])
    return {
        "model": name,
        "base": base_name,
        "tasks": rows,
        "average": fmean(row["accuracy"] for row in rows.values()),
        "worst": {"task": worst, "accuracy": rows[worst]["accuracy"]},
        "datasets": {
            task.name: Path(task.dataset).name if Path(task.dataset).is_absolute() else task.dataset for task in tasks
        },
    }
