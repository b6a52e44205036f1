"""Top-1 accuracy of checkpoints on the test splits of their tasks, on one process or many.

    accuracy = k / N,  k = |{ i : argmax_c logits_c(x_i) = y_i }|
    interval = (k + z^2/2 +- z sqrt(k (N - k) / N + z^2/4)) / (N + z^2),  z = 1.96          Wilson, 95%

Every process classifies its share of the samples, none twice; guesses are gathered once per task. The counting is an
`evaluate` metric of our own, so that nothing is fetched for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate as hf_evaluate
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hf_epimer.errors import DataError, UsageError
from hf_epimer.evaluation.results import Results, Split, TaskResult
from hf_epimer.hub.refs import ModelRef
from hf_epimer.models.classifier import Classifier
from hf_epimer.models.head import check_head, classifier_for, home_of
from hf_epimer.models.loading import load_tower
from hf_epimer.models.source import ModelSource, resolve_model
from hf_epimer.models.trained_head import has_head
from hf_epimer.models.zero_shot_check import BELIEVED, ENOUGH, warn_if_below_zero_shot
from hf_epimer.tasks.dataset import is_large
from hf_epimer.tasks.images import ImageBatches, Samples, read_samples
from hf_epimer.tasks.task import Task, find_task
from hf_epimer.types import Progress


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
    if classes != model.classes:
        raise DataError(f"task {task.name!r} has {classes} classes, the head of the classifier {model.classes}")
    accelerator = Accelerator()
    model.to(accelerator.device)
    batches = ImageBatches(samples, model.pixels, batch_size, (accelerator.process_index, accelerator.num_processes))
    guesses: list[int] = []
    labels: list[int] = []
    for batch in batches:
        guesses += model.top1(batch.inputs).tolist()
        labels += batch.labels.tolist()
        on_samples(len(batch.labels))
    batches.report_broken()
    if accelerator.num_processes > 1:
        guesses, labels = gather_object(guesses), gather_object(labels)
        batches.check_broken(len(samples) - len(labels))
    counts: Any = TopOne(keep_in_memory=True).compute(predictions=guesses, references=labels, classes=classes)
    confusion = tuple(map(tuple, counts["confusion"]))
    return TaskResult(counts["correct"], counts["samples"], samples.class_names, confusion)


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
        base: whose text tower and image processor are used; None for the model itself where it has classifiers for
            all tasks and an image processor, else to infer it as in a merge.
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
    source = resolve_model(ModelRef.parse(model) if isinstance(model, str) else model)
    home = home_of(source, ModelRef.parse(base) if isinstance(base, str) else base, chosen)
    for task in chosen:
        check_head(source, home, task)
    with Accelerator().main_process_first():  # one process fetches, the others find everything in place
        tower = load_tower(source.folder(), home)
    return _evaluate(tower, source, source.title, home, chosen, split, limit, batch_size, fine_tuned, progress)


def evaluate_folder(
    folder: str | Path,
    base: str | Path | ModelSource,
    tasks: Sequence[Task],
    *,
    name: str,
    heads: Path | None = None,
    limit: int | None = None,
    on_task: Callable[[], None] = lambda: None,
) -> Results:
    """Test accuracy of a checkpoint in a local folder, which need not have a card or a proper base.

    Args:
        base: a folder, or a resolved reference.
        name: of the checkpoint, for results.json.
        heads: the folder of the model whose classifiers are used, where it has some; None for the checkpoint itself.
        limit: the first so many samples of each split; None for all.
        on_task: called after every task.
    """
    home = base if isinstance(base, ModelSource) else resolve_model(ModelRef(str(Path(base).absolute())))

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "tasks":
            on_task()

    source = resolve_model(ModelRef(str(Path(heads or folder).absolute())))
    return _evaluate(load_tower(folder, home), source, name, home, tasks, None, limit, 64, None, progress)


def _evaluate(
    tower: nn.Module,
    source: ModelSource,
    name: str,
    base: ModelSource,
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
            model = classifier_for(tower, source, base, task, samples.class_names)
        stage, total = f"evaluating {task.name}", len(samples)
        progress(stage, 0, total)

        def step(count: int, stage: str = stage, total: int = total) -> None:
            progress(stage, count * accelerator.num_processes, total)

        rows[task.name] = classify(model, samples, batch_size, step)
        if rows[task.name].accuracy < BELIEVED and accelerator.is_main_process:
            mixed = read_samples(task, split or task.test_split, limit=ENOUGH, seed=0, streaming=few)
            warn_if_below_zero_shot(model, name, base, ImageBatches(mixed, model.pixels, batch_size))
        progress("tasks", 1, len(tasks))
    measured_on = {
        task.name: Split(
            Path(task.dataset).name if Path(task.dataset).is_absolute() else task.dataset,
            task.config,
            split or task.test_split,
        )
        for task in tasks
    }
    zero_shot = not any(task.head or has_head(source, base.architecture, task) for task in tasks)
    return Results(name, base.title, rows, measured_on, fine_tuned or {}, zero_shot)
