"""A task's data set from the outside: which version of it there is, how large it is, and which of its images are meant.

No row is read here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from hf_epimer.errors import DataError
from hf_epimer.hub import datasets
from hf_epimer.tasks.task import Task

LARGE = 2 * 10**9
"""Bytes of a data set beyond which a few samples are streamed rather than all of it downloaded."""


@dataclass(frozen=True)
class Sampling:
    """Which samples of a split.

    Attributes:
        samples: at most so many.
        fraction: of the split, instead; in (0, 1].
        split: of the data set; None for the task's training split.
        seed: of the choice.
        streaming: fetch only the samples that are used; None, in a recipe, to decide by the size of the data set.
    """

    samples: int | None = 256
    fraction: float | None = None
    split: str | None = None
    seed: int = 0
    streaming: bool | None = False


@dataclass(frozen=True)
class TaskImages:
    """Some images of a task. `hf_epimer.tasks.images.read_images` reads them.

    Attributes:
        nbytes: of the data set's files on the Hub, where that has been asked; it decides nothing.
    """

    task: Task
    sampling: Sampling
    nbytes: int = field(default=0, compare=False)

    @property
    def split(self) -> str:
        """The split that they are of."""
        return self.sampling.split or self.task.train_split

    @property
    def is_streamed(self) -> bool:
        """Whether only these samples are fetched, not the whole data set."""
        return bool(self.sampling.streaming)

    @cached_property
    def revision(self) -> str:
        """The commit of the data set, or a digest of a local folder."""
        return data_revision(self.task)

    def __str__(self) -> str:
        return f"{self.sampling.samples} samples of {self.task.dataset}, split {self.split}"


def is_large(task: Task) -> bool:
    """Whether a task's data set is on the Hub and larger than `LARGE`: a few samples of it are better streamed."""
    return data_bytes(task) > LARGE


def data_bytes(task: Task) -> int:
    """Bytes of the files of a task's data set on the Hub; 0 for a local folder, and when HF_HUB_OFFLINE is set.

    Raises:
        HubError: it cannot be reached.
    """
    return 0 if Path(task.dataset).is_absolute() else datasets.dataset_bytes(task.dataset)


def data_revision(task: Task) -> str:
    """What pins the task's data: the commit of its data set, or a digest of the files of a local folder.

    Raises:
        HubError: it cannot be reached.
        DataError: there is no such folder.
    """
    folder = Path(task.dataset)
    if not folder.is_absolute():
        return datasets.dataset_commit(task.dataset)
    if not folder.exists():
        raise DataError(f"{folder}: the data set of task {task.name!r} is not there")
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        status = path.stat()
        digest.update(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:40]
