"""What is asked for of one checkpoint on one task: which samples, which statistic. Data only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants

from hf_epimer.curvature.data_pass import Labels, Precision
from hf_epimer.curvature.files import FORMATS
from hf_epimer.hub.source import Source
from hf_epimer.methods.statistic import Statistic
from hf_epimer.models.files import content_sha
from hf_epimer.tasks.dataset import data_revision
from hf_epimer.tasks.task import Task

Kind = Literal["per-sample", "squared-mean"]


@dataclass(frozen=True)
class Sampling:
    """Which samples, and what of them. Everything here decides the numbers.

    Attributes:
        samples: at most so many.
        fraction: of the split, instead; in (0, 1].
        split: of the data set; None for the task's training split.
        labels: `true`, or `sampled` from the model's own predictions.
        kind: the mean of per-sample squares, or the square of the mean.
        streaming: fetch only the samples that are used; None, in a recipe, to decide by the size of the data set.
        precision: of the forward and backward pass; sums are always in fp32.
    """

    samples: int | None = 256
    fraction: float | None = None
    split: str | None = None
    labels: Labels = "true"
    seed: int = 0
    kind: Kind = "per-sample"
    streaming: bool | None = False
    precision: Precision = "no"


@dataclass(frozen=True)
class Estimate:
    """Statistics of one checkpoint on one task that are still to be taken, or in the cache already."""

    model: Source
    base: Source
    task: Task
    sampling: Sampling

    @property
    def split(self) -> str:
        """The split whose samples are used."""
        return self.sampling.split or self.task.train_split

    @cached_property
    def revision(self) -> str:
        """The commit of the data set, or a digest of a local folder."""
        return data_revision(self.task)

    @cached_property
    def model_sha(self) -> str:
        """The commit of the checkpoint, or the sha256 of its local weights."""
        return content_sha(self.model)

    def cached(self, statistic: Statistic) -> Path:
        """Where the file is, or will be, in the cache."""
        identity = json.dumps([FORMATS[statistic], self._identity()], sort_keys=True)
        name = f"{self.task.name}-{statistic}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.safetensors"
        return Path(constants.HF_HOME) / "hf-epimer" / "statistics" / name

    def _identity(self) -> dict[str, Any]:
        task = self.task
        if task.head:
            head: Any = hashlib.sha256(Path(task.head).read_bytes()).hexdigest()
        else:
            head = [task.class_names, task.templates]
        return {
            "model": self.model_sha,
            "base": content_sha(self.base),
            "head": head,
            "data": [task.dataset, task.config, self.revision, self.split, task.image_column, task.label_column],
            "sampling": vars(self.sampling),
        }
