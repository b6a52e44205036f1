"""Curvature that is asked for: of which checkpoint, on which images, by which gradients. Data only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_epimer.checkpoints.cache import cached_path
from hf_epimer.methods.statistic import StatisticsFile
from hf_epimer.models.source import ModelSource
from hf_epimer.tasks.dataset import TaskImages
from hf_epimer.types import Precision

Labels = Literal["true", "sampled"]
Kind = Literal["per-sample", "squared-mean"]


@dataclass(frozen=True)
class Gradients:
    """Which gradients are taken of every sample. Everything here decides the numbers.

    Attributes:
        labels: `true`, or `sampled` from the model's own predictions.
        kind: the mean of per-sample squares, or the square of the mean.
        precision: of the forward and backward pass; sums are always in fp32.
    """

    labels: Labels = "true"
    kind: Kind = "per-sample"
    precision: Precision = "no"


@dataclass(frozen=True)
class CurvatureRequest:
    """Curvature of one checkpoint on images of its task, to be measured unless the cache has it."""

    model: ModelSource
    base: ModelSource
    images: TaskImages
    gradients: Gradients = field(default_factory=Gradients)

    def cached(self, file: StatisticsFile) -> Path:
        """Where the file is, or will be, in the cache."""
        identity = json.dumps([file.format, self._identity()], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:24]
        name = f"{self.images.task.file_name}-{file.key}-{digest}.safetensors"
        return cached_path("statistics", name)

    def _identity(self) -> dict[str, Any]:
        images, task = self.images, self.images.task
        if task.head:
            head: Any = hashlib.sha256(Path(task.head).read_bytes()).hexdigest()
        else:
            head = [task.class_names, task.templates]
        return {
            "model": self.model.content_sha,
            "base": self.base.content_sha,
            "head": head,
            "data": [task.dataset, task.config, images.revision, images.split, task.image_column, task.label_column],
            "sampling": vars(images.sampling) | vars(self.gradients),
        }
