"""Top-1 accuracy of a classifier on a split of a task's data set.

    accuracy = |{ i : argmax_c logits_c(x_i) = y_i }| / N

The data are read with `datasets.load_dataset` from the Hub or from a local folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from hf_epimer.classifier import Classifier, load_classifier, task_head
from hf_epimer.data import ImageBatches, read_samples
from hf_epimer.errors import DataError
from hf_epimer.tasks import Task


@dataclass(frozen=True)
class Accuracy:
    """How many of how many samples were classified correctly."""

    correct: int
    samples: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.samples


@torch.inference_mode()
def accuracy(model: Classifier, task: Task, split: str, limit: int | None = None, batch_size: int = 64) -> Accuracy:
    """Classify a split and count the hits."""
    samples = read_samples(task, split, limit=limit)
    classes = len(samples.class_names)
    if classes != len(model.head):
        raise DataError(f"task {task.name!r} has {classes} classes, the head of the classifier {len(model.head)}")
    correct = count = 0
    batches = ImageBatches(samples, model.pixels, batch_size)
    for batch in batches:
        guesses = model(batch.inputs).argmax(-1)
        correct += int((guesses.cpu() == batch.labels).sum())
        count += len(batch.labels)
    batches.report_broken()
    return Accuracy(correct, count)


def evaluate_folder(
    folder: str | Path,
    base_folder: str | Path,
    tasks: Sequence[Task],
    *,
    name: str,
    base_name: str,
    limit: int | None = None,
    on_task: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Test accuracy of one checkpoint on several tasks: the contents of results.json, and `datasets` for the card.

    Args:
        limit: the first so many samples of each split; None for all.
    """
    rows: dict[str, dict[str, Any]] = {}
    for task in tasks:
        names = read_samples(task, task.test_split, limit=1).class_names
        found = accuracy(
            load_classifier(folder, base_folder, task_head(task, base_folder, names)), task, task.test_split, limit
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
