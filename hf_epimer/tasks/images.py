"""A task's samples: from `datasets` to pictures and labels, with everything that can be wrong with data said plainly.

Pictures are decoded one by one here, not by `datasets`, so that a broken one can be named and left out: up to 1% of
the samples asked for, then it is an error. Shuffling is seeded; row i of a split is the same picture on every machine.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from hf_epimer.errors import DataError
from hf_epimer.tasks.dataset import TaskImages
from hf_epimer.tasks.decode import decode
from hf_epimer.tasks.task import Task, plain_name

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

T = TypeVar("T")

BROKEN_SHARE = 0.01
"""Of the samples asked for: so many pictures may be broken."""

SHUFFLE_BUFFER = 10_000
"""Rows that a stream is shuffled among; many data sets are sorted by class, so few would be a biased choice."""


class Batch(NamedTuple):
    """Samples as a model takes them: `inputs` [n, ...], `labels` [n], and which samples of all they are."""

    inputs: Any
    labels: Tensor
    indices: Sequence[int]


@dataclass(frozen=True)
class Samples:
    """Rows of a split, chosen but not decoded.

    Attributes:
        task: whose they are.
        rows: mappings with the task's image column (undecoded) and label column.
        numbers: which rows of the split they are, for messages.
        class_names: in the order of the labels.
    """

    task: Task
    rows: Any
    numbers: Sequence[int]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class ImageBatches:
    """Samples in batches, ready for a model; may be read again from the start.

    Threads prepare the next batch while a model is busy with this one. They need no processes of their own: PIL
    releases the interpreter's lock while it decodes and resizes.

    Attributes:
        samples: all of them; a process reads its `share` = (its number, number of processes).
        pixels: pictures -> the model's input.
        size: of a batch.
        only: the indices of those that are read; None for all.
        broken: what was left out in the last reading, named.
    """

    samples: Samples
    pixels: Callable[[list[Image.Image]], Tensor]
    size: int
    share: tuple[int, int] = (0, 1)
    only: range | None = None
    broken: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Batch]:
        self.broken = []
        rank, processes = self.share
        read = range(len(self.samples)) if self.only is None else self.only
        with _threads() as pool:
            prepared = self._prepared(pool, read[rank::processes])
            while chunk := list(islice(prepared, self.size)):
                indices, inputs, labels = zip(*chunk, strict=True)
                yield Batch(torch.cat(inputs), torch.tensor(labels), indices)

    def _prepared(self, pool: ThreadPoolExecutor, indices: Sequence[int]) -> Iterator[tuple[int, Tensor, int]]:
        """(index, model's input [1, ...], label) of every picture that is whole, in order."""
        samples, task = self.samples, self.samples.task
        rows = ((index, samples.rows[index]) for index in indices)
        begun = ((index, row, pool.submit(self._prepare, row[task.image_column])) for index, row in rows)
        for index, row, picture in _ahead(begun, max(self.size, os.cpu_count() or 1)):
            label = _checked_label(row[task.label_column], samples, index)
            ready = picture.result()
            if isinstance(ready, Tensor):
                yield index, ready, label
            else:
                self.broken.append(f"row {samples.numbers[index]} ({_reason(ready)})")
                self.check_broken(len(self.broken))

    def _prepare(self, value: Any) -> Tensor | Exception:
        """A picture as the model takes it, or why it cannot be decoded."""
        try:
            image = decode(value)
        except Exception as error:  # a broken file can make a decoder raise anything
            return error
        return self.pixels([image])

    def check_broken(self, count: int) -> None:
        """Refuse to go on with too many broken pictures.

        Args:
            count: how many there are so far, on all processes.

        Raises:
            DataError: more than `BROKEN_SHARE` of the samples, naming the first.
        """
        if count > math.floor(BROKEN_SHARE * len(self.samples)):
            task = self.samples.task
            raise DataError(
                f"{task.dataset}: {count} of {len(self.samples)} images of task {task.name!r} cannot be decoded, more "
                f"than 1%: {'; '.join(self.broken[:3])}"
            )

    def report_broken(self) -> None:
        """A warning that names what was left out."""
        if self.broken:
            task = self.samples.task
            logger.warning(
                "%s: %d images of task %r cannot be decoded and were left out: %s",
                task.dataset, len(self.broken), task.name, "; ".join(self.broken[:10]),
            )  # fmt: skip


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """One for every core; none outlives the block, also where a reader stops early."""
    pool = ThreadPoolExecutor(os.cpu_count(), "picture")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items; when one is given, the next `count` have been taken already."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def read_images(images: TaskImages) -> Samples:
    """The rows of images that have been chosen.

    Raises:
        DataError: as in `read_samples`.
    """
    sampling = images.sampling
    return read_samples(
        images.task,
        images.split,
        limit=sampling.samples,
        fraction=sampling.fraction,
        seed=sampling.seed,
        revision=None if Path(images.task.dataset).is_absolute() else images.revision,
        streaming=bool(sampling.streaming),
    )


def read_samples(
    task: Task,
    split: str,
    *,
    limit: int | None = None,
    fraction: float | None = None,
    seed: int | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Samples:
    """Choose rows of a split of the task's data set.

    Args:
        limit: at most so many rows; None for all.
        fraction: this share of the rows instead, in (0, 1].
        seed: shuffles first; None keeps the order.
        revision: a commit of the data set; None for the newest.
        streaming: fetch only what is needed; shuffles among `SHUFFLE_BUFFER` rows. Needs `limit`.

    Raises:
        DataError: the data set cannot be read, has no such split or column, no rows, or class names that disagree.
    """
    if streaming and limit is None:
        raise DataError(f"{task.dataset}: a stream needs a number of samples (--samples), not a share of them all")
    data = _load(task, split, revision, streaming)
    columns = list(data.column_names or [])
    for column in (task.image_column, task.label_column):
        if column not in columns:
            raise DataError(f"{task.dataset}: no column {column!r} for task {task.name!r}; it has {columns}")
    names = class_names_of(task, data.features)
    with _explained(task, split):
        data = _undecoded(task, data.select_columns([task.image_column, task.label_column]))
        if streaming:
            shuffled = data if seed is None else data.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
            rows: Any = list(shuffled.take(limit))
            numbers: Sequence[int] = range(len(rows))
        else:
            count = len(data) if fraction is None else max(1, round(fraction * len(data)))
            count = min(len(data), count if limit is None else limit)
            order = np.arange(len(data)) if seed is None else np.random.default_rng(seed).permutation(len(data))
            numbers = order[:count].tolist()
            rows = data.select(numbers)
    if not len(rows):
        raise DataError(f"{task.dataset}: split {split!r} of task {task.name!r} has no samples to use")
    return Samples(task, rows, numbers, names)


def class_names_of(task: Task, features: Any) -> tuple[str, ...]:
    """The task's class names, by default those stored with the labels.

    Raises:
        DataError: there are none, or the task's and the stored ones differ in number or in order.
    """
    stored = getattr((features or {}).get(task.label_column), "names", None)
    if task.class_names is None and stored is None:
        raise DataError(f"{task.dataset}: the labels carry no names; give class_names for task {task.name!r}")
    names = tuple(task.class_names or stored or ())
    if stored is not None and len(stored) != len(names):
        raise DataError(f"task {task.name!r} names {len(names)} classes, the labels of {task.dataset} {len(stored)}")
    if stored is not None:
        ours, theirs = [plain_name(name) for name in names], [plain_name(name) for name in stored]
        if ours != theirs and sorted(ours) == sorted(theirs):
            place = next(index for index, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            raise DataError(
                f"task {task.name!r} and {task.dataset} list the same classes in another order: label {place} is "
                f"{names[place]!r} in the task and {stored[place]!r} in the data"
            )
    return names


def _reason(error: Exception) -> str:
    """What is wrong with a picture, without the address of the object that it was read from."""
    line = (str(error).splitlines() or [""])[0]
    return re.sub(r"\s*<[\w.]+ object at 0x[0-9a-f]+>", "", line) or type(error).__name__


def _checked_label(label: Any, samples: Samples, index: int) -> int:
    task, classes = samples.task, len(samples.class_names)
    where = f"{task.dataset}: row {samples.numbers[index]} has the label {label!r}"
    if not isinstance(label, int):
        raise DataError(f"{where}; column {task.label_column!r} of task {task.name!r} must hold class numbers")
    if not 0 <= label < classes:
        raise DataError(f"{where}, but task {task.name!r} has {classes} classes")
    return int(label)  # some data sets of two classes say no and yes


def _undecoded(task: Task, data: Any) -> Any:
    from datasets import Image as ImageFeature

    return data.cast_column(task.image_column, ImageFeature(decode=False))


def _load(task: Task, split: str, revision: str | None, streaming: bool) -> Any:
    from datasets import load_dataset

    is_local = Path(task.dataset).is_absolute()
    with _explained(task, split):
        return load_dataset(
            task.dataset, task.config, split=split, revision=None if is_local else revision, streaming=streaming
        )


def _is_about_cache(error: OSError) -> bool:
    """Whether the disk is full, or a file of the cache of `datasets` cannot be written."""
    from datasets import config

    return error.errno == errno.ENOSPC or str(error.filename or "").startswith(str(config.HF_DATASETS_CACHE))


@contextmanager
def _explained(task: Task, split: str) -> Iterator[None]:
    """What `datasets` raises as one line that names the data set, the split and the task."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub import constants

    try:
        yield
    except (DatasetsError, OSError, ValueError, TypeError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ is not None else error
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        if isinstance(error, (DatasetNotFoundError, ConnectionError)) and not Path(task.dataset).is_absolute():
            found = "there is no such data set on the Hub that the token in use may read"
            if isinstance(error, ConnectionError):
                found = "it is not in the local cache, and " + (
                    "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
                )
            reason = f"{found}; nor is there such a folder beside the task file"
        if "scripts are no longer supported" in reason:
            reason = (
                "it is a loading script, which `datasets` no longer runs; convert it to parquet, or name a copy "
                "in parquet in a task file"
            )
        if isinstance(cause, OSError) and _is_about_cache(cause):
            reason += "; set HF_HOME to a folder with room that you may write to"
        raise DataError(f"{task.dataset}, split {split!r} of task {task.name!r}: {reason}") from error
