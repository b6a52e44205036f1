"""A task's data set from the outside: which version of it there is, and how large it is. No row is read."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hf_epimer.errors import DataError
from hf_epimer.hub import source as hub
from hf_epimer.tasks.task import Task

LARGE = 2 * 10**9
"""Bytes of a data set from which on a few samples are streamed rather than all of it downloaded."""


def data_revision(task: Task) -> str:
    """What pins the task's data: the commit of its data set, or a digest of the files of a local folder.

    Raises:
        HubError: it cannot be reached.
        DataError: there is no such folder.
    """
    folder = Path(task.dataset)
    if not folder.is_absolute():
        return hub.dataset_commit(task.dataset)
    if not folder.exists():
        raise DataError(f"{folder}: the data set of task {task.name!r} is not there")
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        status = path.stat()
        digest.update(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:40]


def is_large(task: Task) -> bool:
    """Whether a task's data set is on the Hub and larger than `LARGE`: a few samples of it are better streamed."""
    return not Path(task.dataset).is_absolute() and hub.dataset_bytes(task.dataset) > LARGE
