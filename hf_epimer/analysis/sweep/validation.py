"""The samples on which settings are compared.

    pi = permutation of the training split, by the seed        Fisher samples: pi[0], pi[1], ... (`read_samples`)
                                                               validation: the last tenth of pi, from its end

so that what was measured on is never what is chosen on, as long as the two do not meet.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from hf_epimer.curvature.request import CurvatureRequest
from hf_epimer.errors import TaskError, UsageError
from hf_epimer.pipeline.plan import CurvatureFile
from hf_epimer.tasks.dataset import data_revision
from hf_epimer.tasks.images import Samples, read_samples
from hf_epimer.tasks.task import Task

VALIDATION_SHARE = 0.1
"""Of the training split."""


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
