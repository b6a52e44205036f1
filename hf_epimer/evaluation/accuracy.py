"""Top-1 accuracy of checkpoints on the test splits of their tasks, on one process or many.

    accuracy = k / N,  k = |{ i : argmax_c logits_c(x_i) = y_i }|
    interval = (k + z^2/2 +- z sqrt(k (N - k) / N + z^2/4)) / (N + z^2),  z = 1.96          Wilson, 95%

Every process classifies its share of the samples, none twice; guesses are gathered once per task. The counting is an
`evaluate` metric of our own, so that nothing is fetched for it. Processors that multiply in bfloat16 do so, three times
as fast and with the same guesses: docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import datasets
import evaluate as hf_evaluate
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hf_epimer.errors import DataError, UsageError
from hf_epimer.evaluation.results import Results, Split, TaskResult
from hf_epimer.hub.refs import ModelRef
from hf_epimer.models.classifier import Classifier
from hf_epimer.models.head import check_head, classifier_for, home_of
from hf_epimer.models.loading import load_tower
from hf_epimer.models.source import ModelSource, resolve_model
from hf_epimer.models.trained_head import has_head
from hf_epimer.models.zero_shot_check import BELIEVED, ENOUGH, warn_if_below_zero_shot
from hf_epimer.numerics.product import has_bfloat16
from hf_epimer.tasks.dataset import is_large
from hf_epimer.tasks.images import ImageBatches, Samples, read_samples
from hf_epimer.tasks.task import Task, find_task
from hf_epimer.types import Precision, Progress


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
    return classify([model], read_samples(task, split, limit=limit), batch_size, on_samples)[0]


def precision_on(device: torch.device) -> Precision:
    """What classifies fastest there, where nothing else is asked for."""
    return "bf16" if has_bfloat16(device) else "no"


@torch.inference_mode()
def classify(
    models: Sequence[Classifier],
    samples: Samples,
    batch_size: int = 64,
    on_samples: Callable[[int], None] = lambda count: None,
    precision: Precision | None = None,
) -> list[TaskResult]:
    """Classify samples; under `accelerate launch` every process takes its share and all get the whole result.

    Args:
        models: towers behind the same head, all shown a picture when it has been decoded.
        precision: None for `precision_on` the device.

    Raises:
        DataError: the head has another number of classes than the data, or the data cannot be read.
    """
    task, classes = samples.task, len(samples.class_names)
    head = models[0].classes
    if classes != head:
        raise DataError(f"task {task.name!r} has {classes} classes, the head of the classifier {head}")
    accelerator = Accelerator()
    for model in models:
        model.to(accelerator.device)
    precision = precision or precision_on(accelerator.device)
    share = (accelerator.process_index, accelerator.num_processes)
    batches = ImageBatches(samples, models[0].pixels, batch_size, share)
    guesses: list[list[int]] = [[] for _ in models]
    labels: list[int] = []
    for batch in batches:
        for model, guessed in zip(models, guesses, strict=True):
            guessed += model.top1(batch.inputs, precision).tolist()
        labels += batch.labels.tolist()
        on_samples(len(batch.labels))
    batches.report_broken()
    if accelerator.num_processes > 1:
        guesses, labels = [gather_object(guessed) for guessed in guesses], gather_object(labels)
        batches.check_broken(len(samples) - len(labels))
    return [_counted(guessed, labels, samples.class_names) for guessed in guesses]


def _counted(guesses: Sequence[int], labels: Sequence[int], class_names: tuple[str, ...]) -> TaskResult:
    metric = TopOne(keep_in_memory=True)
    counts: Any = metric.compute(predictions=guesses, references=labels, classes=len(class_names))
    confusion = tuple(map(tuple, counts["confusion"]))
    return TaskResult(counts["correct"], counts["samples"], class_names, confusion)


def evaluate(
    model: str | ModelRef,
    tasks: Sequence[str | Task],
    base: str | ModelRef | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    precision: Precision | None = None,
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
        precision: of the tower's products; None for bfloat16 where the device multiplies in it.
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
    if precision not in (None, *get_args(Precision)):
        raise UsageError(f"--mixed-precision must be {' or '.join(get_args(Precision))}, not {precision}")
    source = resolve_model(ModelRef.parse(model) if isinstance(model, str) else model)
    home = home_of(source, ModelRef.parse(base) if isinstance(base, str) else base, chosen)
    for task in chosen:
        check_head(source, home, task)
    with Accelerator().main_process_first():  # one process fetches, the others find everything in place
        folder = source.folder()
    return _evaluate(
        folder,
        source,
        source.title,
        home,
        chosen,
        split=split,
        limit=limit,
        batch_size=batch_size,
        precision=precision,
        fine_tuned=fine_tuned,
        progress=progress,
    )


def evaluate_folder(
    folder: str | Path,
    base: str | Path | ModelSource,
    tasks: Sequence[Task],
    *,
    name: str,
    heads: Path | None = None,
    limit: int | None = None,
    specialists: Mapping[str, Sequence[ModelSource]] | None = None,
    on_task: Callable[[], None] = lambda: None,
) -> Results:
    """Test accuracy of a checkpoint in a local folder, which need not have a card or a proper base.

    Args:
        base: a folder, or a resolved reference.
        name: of the checkpoint, for results.json.
        heads: the folder of the model whose classifiers are used, where it has some; None for the checkpoint itself.
        limit: the first so many samples of each split; None for all.
        specialists: task -> models that were fine-tuned on it. They and the base are shown the same pictures; of
            several, the best counts. None for the checkpoint alone.
        on_task: called after every task.
    """
    home = base if isinstance(base, ModelSource) else resolve_model(ModelRef(str(Path(base).absolute())))

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "tasks":
            on_task()

    source = resolve_model(ModelRef(str(Path(heads or folder).absolute())))
    return _evaluate(folder, source, name, home, tasks, limit=limit, specialists=specialists, progress=progress)


def _evaluate(
    folder: str | Path,
    source: ModelSource,
    name: str,
    base: ModelSource,
    tasks: Sequence[Task],
    *,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    precision: Precision | None = None,
    fine_tuned: Mapping[str, float] | None = None,
    specialists: Mapping[str, Sequence[ModelSource]] | None = None,
    progress: Progress,
) -> Results:
    """One head after the other. Towers in memory: the checkpoint's, and to compare the base's and a task's specialists.

    Args:
        source: whose classifiers are used, where it has some.
    """
    accelerator = Accelerator()
    precision = precision or precision_on(accelerator.device)
    tower = load_tower(folder, base)
    tower_of_base = [] if specialists is None else [load_tower(base.folder(), base)]
    rows: dict[str, TaskResult] = {}
    of_base: dict[str, float] = {}
    best = dict(fine_tuned or {})
    for task in tasks:
        with accelerator.main_process_first():
            few = limit is not None and is_large(task)  # the same rows, without the rest of a large data set
            samples = read_samples(task, split or task.test_split, limit=limit, streaming=few)
            model = classifier_for(tower, source, base, task, samples.class_names)
        stage, total = f"evaluating {task.name}", len(samples)
        progress(stage, 0, total)

        def step(count: int, stage: str = stage, total: int = total) -> None:
            progress(stage, count * accelerator.num_processes, total)

        tuned = (specialists or {}).get(task.name, ())
        towers = [load_tower(each.folder(), base) for each in tuned]
        models = [model, *map(model.with_tower, [*towers, *tower_of_base])]
        results = classify(models, samples, batch_size, step, precision)
        if tower_of_base:
            of_base[task.name] = results.pop().accuracy
            models.pop()
        rows[task.name], *of_tuned = results
        if of_tuned:
            best[task.name] = max(result.accuracy for result in of_tuned)
        titles = [name, *(each.title for each in tuned)]
        for title, each, result in zip(titles, models, results, strict=True):
            if result.accuracy < BELIEVED and accelerator.is_main_process:
                mixed = read_samples(task, split or task.test_split, limit=ENOUGH, seed=0, streaming=few)
                batches = ImageBatches(mixed, model.pixels, batch_size)
                warn_if_below_zero_shot(each, title, base, batches, precision)
        progress("tasks", 1, len(tasks))
    measured_on = {task.name: _measured_on(task, split or task.test_split) for task in tasks}
    zero_shot = not any(task.head or has_head(source, base.architecture, task) for task in tasks)
    return Results(name, base.title, rows, measured_on, best, zero_shot, of_base, precision)


def _measured_on(task: Task, split: str) -> Split:
    dataset = Path(task.dataset).name if Path(task.dataset).is_absolute() else task.dataset
    return Split(dataset, task.config, split)
