"""The samples on which settings are compared, and how many of them each setting gets right.

    pi = permutation of the training split, by the seed        Fisher samples: pi[0], pi[1], ... (`read_samples`)
                                                               validation: the last tenth of pi, from its end

so that what was measured on is never what is chosen on, as long as the two do not meet. Pictures are decoded and
preprocessed once for all settings: a bounded part of them is kept as pixels while every setting classifies it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from hf_epimer.curvature.request import CurvatureRequest
from hf_epimer.errors import TaskError, UsageError
from hf_epimer.evaluation.accuracy import precision_on
from hf_epimer.evaluation.results import TaskResult
from hf_epimer.models.classifier import Classifier
from hf_epimer.pipeline.plan import CurvatureFile
from hf_epimer.tasks.dataset import data_revision
from hf_epimer.tasks.images import Batch, ImageBatches, Samples, read_samples
from hf_epimer.tasks.task import Task

VALIDATION_SHARE = 0.1
"""Of the training split."""

MEMORY_FOR_PIXELS = 10**9
"""Bytes of preprocessed pictures that are kept at a time; a single batch may take more."""


def validation_samples(task: Task, seed: int, limit: int | None = None) -> tuple[Samples, int]:
    """The end of the seeded permutation of the training split.

    Args:
        limit: at most so many of the tenth, the last ones.

    Returns:
        The samples, and how many rows of the permutation come before them.

    Raises:
        TaskError: the task's training split is its test split.
        DataError: as in `read_samples`.
    """
    if task.train_split == task.test_split:
        raise TaskError(
            f"task {task.name!r}: its training split is its test split ({task.test_split!r}), and settings are never "
            "chosen on test: name another train_split in the task file"
        )
    revision = None if Path(task.dataset).is_absolute() else data_revision(task)
    everything = read_samples(task, task.train_split, seed=seed, revision=revision)
    size = max(1, round(VALIDATION_SHARE * len(everything)))
    before = len(everything) - (size if limit is None else min(limit, size))
    rows = everything.rows.select(range(before, len(everything)))
    return replace(everything, rows=rows, numbers=everything.numbers[before:]), before


def check_disjoint(samples: Samples, before: int, statistics: CurvatureFile | CurvatureRequest) -> str | None:
    """Compare the validation samples with those that statistics of the same task are, or will be, measured on.

    Args:
        before: how many rows of the permutation come before them.

    Returns:
        A warning where a file that is there already was measured on some of them; None where it was not, or where
        the file does not say.

    Raises:
        UsageError: what is to be estimated would be.
    """
    task = samples.task
    if isinstance(statistics, CurvatureRequest):
        count = statistics.images.sampling.samples
        if count is not None and count > before:
            raise UsageError(
                f"--samples {count}: the training split of {task.name!r} has {before} samples beside the "
                f"{len(samples)} on which settings are compared, so give at most --samples {before}"
            )
        return None
    path = statistics.fetch()
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError):  # said better when it is opened to be read
        return None
    if header.get("task") != task.name or not (header.get("samples", "") + header.get("seed", "")).isdigit():
        return None
    order = np.random.default_rng(int(header["seed"])).permutation(before + len(samples))
    shared = set(order[: int(header["samples"])].tolist()) & set(samples.numbers)
    if not shared:
        return None
    return (
        f"{path.name} of {task.name!r} was measured on {len(shared)} of the {len(samples)} images on which settings "
        "are compared: methods that use it look better than they are"
    )


def measure(
    model: Classifier,
    samples: Samples,
    loaders: Sequence[Callable[[], None]],
    *,
    batch_size: int = 64,
    on_images: Callable[[int], None] = lambda count: None,
) -> list[TaskResult]:
    """Top-1 accuracy of several sets of weights on the same samples, in the precision of `evaluate`.

    Args:
        model: behind the head of the task, for the classes of the samples.
        loaders: each puts one set of weights into the model.
        on_images: called with the number of pictures classified.

    Raises:
        DataError: too many pictures are broken.
    """
    correct, count = [0] * len(loaders), 0
    precision = precision_on(next(model.tower.parameters()).device)
    batches = ImageBatches(samples, model.pixels, batch_size)
    for chunk in _chunks(batches):
        count += sum(len(batch.labels) for batch in chunk)
        for number, load in enumerate(loaders):
            load()
            for batch in chunk:
                correct[number] += int((model.top1(batch.inputs, precision) == batch.labels).sum())
                on_images(len(batch.labels))
    batches.report_broken()
    return [TaskResult(right, count) for right in correct]


def _chunks(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """As many batches together as may be kept in memory."""
    kept: list[Batch] = []
    for batch in batches:
        kept.append(batch)
        if sum(other.inputs.nbytes for other in kept) + batch.inputs.nbytes > MEMORY_FOR_PIXELS:
            yield kept
            kept = []
    if kept:
        yield kept
