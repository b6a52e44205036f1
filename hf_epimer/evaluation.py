"""Top-1 accuracy of checkpoints on the test splits of their tasks, on one process or many.

    accuracy = k / N,  k = |{ i : argmax_c logits_c(x_i) = y_i }|
    interval = (k + z^2/2 +- z sqrt(k (N - k) / N + z^2/4)) / (N + z^2),  z = 1.96          Wilson, 95%

Every process classifies its share of the samples, none twice; guesses are gathered once per task. The counting is an
`evaluate` metric of our own, so that nothing is fetched for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import evaluate as hf_evaluate
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hf_epimer import hub
from hf_epimer.classifier import Classifier
from hf_epimer.config import ModelRef
from hf_epimer.data import ImageBatches, Samples, is_large, read_samples
from hf_epimer.errors import DataError, UsageError
from hf_epimer.heads import classifier_for, load_tower
from hf_epimer.hub import Source
from hf_epimer.resolving import base_of, model_folder
from hf_epimer.tasks import Task, find_task

Progress = Callable[[str, int, int], None]
Z = 1.96
"""Of a 95% interval."""


class TopOne(hf_evaluate.Metric):
    """Accuracy with everything that follows from the guesses: counts, interval, confusion matrix."""

    def _info(self) -> hf_evaluate.MetricInfo:
        return hf_evaluate.MetricInfo(
            description="Top-1 accuracy with a Wilson interval and the confusion matrix.",
            citation="",
            inputs_description="predictions, references: class numbers; classes: how many there are",
            features=datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int], classes: int) -> dict[str, Any]:
        guesses, labels = torch.tensor(predictions), torch.tensor(references)
        confusion = torch.bincount(labels * classes + guesses, minlength=classes**2).view(classes, classes)
        correct = int(confusion.diagonal().sum())
        return {"correct": correct, "samples": len(labels), "confusion": confusion.tolist()}


@dataclass(frozen=True)
class TaskResult:
    """One checkpoint on one task; `confusion[i][j]` counts samples of class i taken for class j."""

    correct: int
    samples: int
    class_names: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    @property
    def accuracy(self) -> float:
        """Share of hits."""
        return self.correct / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        return wilson(self.correct, self.samples)

    def per_class(self) -> dict[str, float | None]:
        """Accuracy within each class; None where the split has no sample of it."""
        totals = [sum(row) for row in self.confusion]
        return {
            name: row[index] / total if total else None
            for index, (name, row, total) in enumerate(zip(self.class_names, self.confusion, totals, strict=True))
        }


def wilson(correct: int, samples: int) -> tuple[float, float]:
    """The 95% interval of a share k / N."""
    centre = correct + Z**2 / 2
    half = Z * math.sqrt(correct * (samples - correct) / samples + Z**2 / 4)
    return max(0.0, (centre - half) / (samples + Z**2)), min(1.0, (centre + half) / (samples + Z**2))


def accuracy(
    model: Classifier,
    task: Task,
    split: str,
    limit: int | None = None,
    batch_size: int = 64,
    on_samples: Callable[[int], None] = lambda count: None,
) -> TaskResult:
    """Classify a split, or its first `limit` rows."""
    return classify(model, read_samples(task, split, limit=limit), batch_size, on_samples)


@torch.inference_mode()
def classify(
    model: Classifier, samples: Samples, batch_size: int = 64, on_samples: Callable[[int], None] = lambda count: None
) -> TaskResult:
    """Classify samples; under `accelerate launch` every process takes its share and all get the whole result.

    Raises:
        DataError: the head has another number of classes than the data, or the data cannot be read.
    """
    task, classes = samples.task, len(samples.class_names)
    if classes != len(model.head):
        raise DataError(f"task {task.name!r} has {classes} classes, the head of the classifier {len(model.head)}")
    accelerator = Accelerator()
    model.to(accelerator.device)
    batches = ImageBatches(samples, model.pixels, batch_size, (accelerator.process_index, accelerator.num_processes))
    guesses: list[int] = []
    labels: list[int] = []
    for batch in batches:
        guesses += model(batch.inputs).argmax(-1).tolist()
        labels += batch.labels.tolist()
        on_samples(len(batch.labels))
    batches.report_broken()
    if accelerator.num_processes > 1:
        guesses, labels = gather_object(guesses), gather_object(labels)
        batches.check_broken(len(samples) - len(labels))
    found: Any = TopOne(keep_in_memory=True).compute(predictions=guesses, references=labels, classes=classes)
    confusion = tuple(map(tuple, found["confusion"]))
    return TaskResult(found["correct"], found["samples"], samples.class_names, confusion)


@dataclass(frozen=True)
class Results:
    """One checkpoint on several tasks; `to_json()` is results.json.

    Attributes:
        model, base: as they are called in cards.
        tasks: by name.
        datasets: task -> data set, for the card.
        fine_tuned: task -> accuracy of the fine-tuned model, where it is known.
    """

    model: str
    base: str
    tasks: dict[str, TaskResult]
    datasets: dict[str, str]
    fine_tuned: dict[str, float] = field(default_factory=dict)

    @property
    def average(self) -> float:
        """Mean accuracy over tasks."""
        return fmean(row.accuracy for row in self.tasks.values())

    @property
    def worst(self) -> str:
        """The task with the lowest accuracy."""
        return min(self.tasks, key=lambda task: self.tasks[task].accuracy)

    @property
    def normalized(self) -> dict[str, float]:
        """Accuracy over the fine-tuned model's, for tasks where that is known and not 0."""
        known = {task: own for task, own in self.fine_tuned.items() if task in self.tasks and own > 0}
        return {task: self.tasks[task].accuracy / own for task, own in known.items()}

    def to_json(self, per_class: bool = False) -> dict[str, Any]:
        """Plain values; with `per_class` also the accuracy within each class."""
        rows: dict[str, dict[str, Any]] = {}
        for task, row in self.tasks.items():
            rows[task] = {"accuracy": row.accuracy, "correct": row.correct, "samples": row.samples}
            rows[task]["interval"] = list(row.interval)
            if task in self.normalized:
                rows[task]["normalized"] = self.normalized[task]
            if per_class:
                rows[task]["per_class"] = row.per_class()
        content: dict[str, Any] = {"model": self.model, "base": self.base, "tasks": rows, "average": self.average}
        content["worst"] = {"task": self.worst, "accuracy": self.tasks[self.worst].accuracy}
        if len(self.normalized) == len(self.tasks):
            content["normalized_average"] = fmean(self.normalized.values())
        return content


def evaluate(
    model: str | ModelRef,
    tasks: Sequence[str | Task],
    base: str | ModelRef | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    fine_tuned: dict[str, float] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Results:
    """Accuracy of a checkpoint from the Hub or a folder on several tasks.

    Args:
        model: a reference.
        tasks: built-in names, task files or `Task` objects.
        base: whose heads and image processor are used; None to infer it as in a merge.
        split: None for each task's test split.
        limit: at most so many samples a task, the first ones.
        batch_size: per process.
        fine_tuned: task -> accuracy to normalise by.

    Raises:
        EpimerError: whatever is wrong with the checkpoint, the base, a task or its data.
    """
    chosen = [task if isinstance(task, Task) else find_task(task) for task in tasks]
    names = [task.name for task in chosen]
    if not chosen or len(set(names)) < len(names):
        raise UsageError("give at least one task, and each of them once")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, not {limit}")
    if batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, not {batch_size}")
    source = hub.resolve(ModelRef.parse(model) if isinstance(model, str) else model)
    home = base_of(source, ModelRef.parse(base) if isinstance(base, str) else base)
    with Accelerator().main_process_first():  # one process fetches, the others find everything in place
        folder = model_folder(source)
        vision = load_tower(folder, home)
    return _evaluate(vision, source.title, home, chosen, split, limit, batch_size, fine_tuned, progress)


def evaluate_folder(
    folder: str | Path,
    base: str | Path | Source,
    tasks: Sequence[Task],
    *,
    name: str,
    limit: int | None = None,
    on_task: Callable[[], None] = lambda: None,
) -> Results:
    """Test accuracy of a checkpoint in a local folder, which need not have a card or a proper base.

    Args:
        base: a folder, or a resolved reference.
        name: of the checkpoint, for results.json.
        limit: the first so many samples of each split; None for all.
        on_task: called after every task.
    """
    home = base if isinstance(base, Source) else hub.resolve(ModelRef(str(Path(base).absolute())))

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "tasks":
            on_task()

    return _evaluate(load_tower(folder, home), name, home, tasks, None, limit, 64, None, progress)


def _evaluate(
    vision: nn.Module,
    name: str,
    base: Source,
    tasks: Sequence[Task],
    split: str | None,
    limit: int | None,
    batch_size: int,
    fine_tuned: dict[str, float] | None,
    progress: Progress,
) -> Results:
    """One tower, one head after the other."""
    accelerator = Accelerator()
    rows = {}
    for task in tasks:
        with accelerator.main_process_first():
            few = limit is not None and is_large(task)  # the same rows, without the rest of a large data set
            samples = read_samples(task, split or task.test_split, limit=limit, streaming=few)
            model = classifier_for(vision, base, task, samples.class_names)
        stage, total = f"evaluating {task.name}", len(samples)
        progress(stage, 0, total)

        def step(count: int, stage: str = stage, total: int = total) -> None:
            progress(stage, count * accelerator.num_processes, total)

        rows[task.name] = classify(model, samples, batch_size, step)
        progress("tasks", 1, len(tasks))
    places = {
        task.name: Path(task.dataset).name if Path(task.dataset).is_absolute() else task.dataset for task in tasks
    }
    return Results(name, base.title, rows, places, fine_tuned or {})
