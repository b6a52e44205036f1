"""Merges of one set of checkpoints in memory, measured picture by picture on validation images.

Which pictures a merge gets right is kept, not only how many: two merges are compared on the same pictures, so that the
standard error is that of their difference. Validation images are the end of the training split, as in
`hf-epimer sweep`; statistics and calibration use its beginning; test splits are not read.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_epimer import METHODS, ModelRef, hub, merge_state_dicts
from hf_epimer.architectures import CLIP_VISION
from hf_epimer.calibrating import CalibrationTask, calibrate
from hf_epimer.checkpoints import StateDict
from hf_epimer.classifier import load_processor, load_vision, preprocess
from hf_epimer.data import ImageBatches
from hf_epimer.heads import classifier_for
from hf_epimer.methods.base import Statistic
from hf_epimer.statistics.estimation import Estimate, Sampling, estimate_file, images_of
from hf_epimer.statistics.files import kind_of
from hf_epimer.tasks import Task, load_task_file
from hf_epimer.validation import validation_samples

Tensors = dict[str, Tensor]
Hits = dict[str, Tensor]
"""Task -> which pictures were classified correctly."""


class Bench:
    """One set of tasks of one zoo: DIR/base, DIR/tasks/NAME or DIR/NAME, DIR/task_files/NAME.yaml or DIR/tasks/..."""

    def __init__(self, zoo: Path, tasks: Sequence[str], limit: int) -> None:
        nested = (zoo / "task_files").is_dir()
        self.names, self.limit = list(tasks), limit
        self.tasks = [load_task_file(zoo / ("task_files" if nested else "tasks") / f"{n}.yaml") for n in tasks]
        folders = [zoo / "tasks" / name if nested else zoo / name for name in tasks]
        self.models = [hub.resolve(ModelRef(str(f.absolute()), label=n)) for n, f in zip(tasks, folders, strict=True)]
        self.home = hub.resolve(ModelRef(str((zoo / "base").absolute()), label="base"))
        self.folder = zoo / "base"
        self.tuned = [_tower(folder) for folder in folders]
        self.base = _tower(self.folder)

    @cached_property
    def pictures(self) -> dict[str, tuple[Any, list[Any]]]:
        """Task -> its classifier (of one shared tower) and its validation batches."""
        vision, found = load_vision(self.folder), {}
        for task in self.tasks:
            samples, _ = validation_samples(task, 0, self.limit)
            model = classifier_for(vision, self.home, task, samples.class_names)
            found[task.name] = model, list(ImageBatches(samples, model.pixels, 50))
        return found

    def statistics(
        self, statistic: Statistic, samples: int = 256, seed: int = 0, labels: str = "true"
    ) -> list[Tensors]:
        """Of every model, from the cache or measured now."""
        return [
            load_file(estimate_file(self._estimate(n, samples, seed, labels), kind_of(statistic)))
            for n in range(len(self.names))
        ]

    def merge(self, method: str, options: Mapping[str, Any], samples: int = 256, seed: int = 0) -> Tensors:
        """By a method from METHODS."""
        config = METHODS[method].config(**options)
        needs = METHODS[method].statistic(config)
        measured = self.statistics(needs, samples, seed) if needs else None
        if measured and needs == "gram":
            suffix = ".input_factor"
            measured = [{n.removesuffix(suffix): v for n, v in own.items() if suffix in n} for own in measured]
        return merge_state_dicts(self.base, self.tuned, method, config, measured, labels=self.names)

    def calibrated(
        self, merged: Tensors, samples: int = 256, seed: int = 0, labels: str = "true", **options: float
    ) -> Tensors:
        """A merge, calibrated."""
        tower = load_vision(self.folder)
        _put(tower, merged)
        pixels = partial(preprocess, load_processor(self.folder))
        tasks = [
            CalibrationTask(
                StateDict(name, tuned),
                StateDict(name, curvature),
                images_of(self._estimate(number, samples, seed, labels), pixels),
            )
            for number, (name, tuned, curvature) in enumerate(
                zip(self.names, self.tuned, self.statistics("outputs", samples, seed, labels), strict=True)
            )
        ]
        with tempfile.TemporaryDirectory() as folder:
            calibrate(tower, tasks, [1 / len(tasks)] * len(tasks), CLIP_VISION, Path(folder), **options)
        return {f"vision_model.{name}": value.detach() for name, value in tower.named_parameters()}

    def scaled(self, merged: Tensors, alpha: float) -> Tensors:
        """theta_0 + alpha (merged - theta_0)."""
        return {name: self.base[name] + alpha * (value - self.base[name]) for name, value in merged.items()}

    def measure(self, merged: Tensors) -> Hits:
        """Picture by picture."""
        found = {}
        for name, (model, batches) in self.pictures.items():
            _put(model.vision, merged)
            with torch.inference_mode():
                right = [model(batch.inputs).argmax(-1) == batch.labels for batch in batches]
            found[name] = torch.cat(right)
        return found

    def _estimate(self, number: int, samples: int, seed: int, labels: str) -> Estimate:
        sampling = Sampling(samples, seed=seed, labels=labels)  # type: ignore[arg-type]
        return Estimate(self.models[number], self.home, self.tasks[number], sampling)


def average(found: Hits) -> float:
    """Mean accuracy over tasks."""
    return sum(float(right.float().mean()) for right in found.values()) / len(found)


def worst(found: Hits) -> float:
    """Accuracy on the worst task."""
    return min(float(right.float().mean()) for right in found.values())


def difference(one: Hits, two: Hits) -> tuple[float, float]:
    """Mean over tasks of accuracy(one) - accuracy(two) on the same pictures, and its standard error."""
    apart = [one[task].float() - two[task].float() for task in one]
    mean = sum(float(own.mean()) for own in apart) / len(apart)
    variance = sum(float(own.var()) / len(own) for own in apart) / len(apart) ** 2
    return mean, math.sqrt(variance)


def _tower(folder: Path) -> Tensors:
    return {f"vision_model.{name}": value.detach() for name, value in load_vision(folder).named_parameters()}


@torch.no_grad()
def _put(tower: torch.nn.Module, weights: Tensors) -> None:
    for name, parameter in tower.named_parameters():
        parameter.copy_(weights[f"vision_model.{name}"])


__all__ = ["Bench", "Hits", "Task", "Tensors", "average", "difference", "worst"]
