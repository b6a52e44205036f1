"""Merges of one set of checkpoints in memory, measured picture by picture on validation images.

Which pictures a merge gets right is kept, not only how many: two merges are compared on the same pictures, so that the
standard error is that of their difference. The training split of a task is put in one seeded order; curvature and
calibration take pictures from its beginning, validation the last ones; test splits are not read.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, nll_loss

from hf_epimer import METHODS, ModelRef, merge_state_dicts
from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.curvature.accumulators import ACCUMULATORS, Accumulator
from hf_epimer.curvature.data_pass import Subject, accumulate
from hf_epimer.curvature.request import Labels
from hf_epimer.methods.statistic import POSITIONS, StatisticKind, StatisticsFile
from hf_epimer.models.classifier import Classifier
from hf_epimer.models.clip import CLIP
from hf_epimer.models.head import classifier_for
from hf_epimer.models.loading import load_tower
from hf_epimer.models.source import resolve_model
from hf_epimer.models.weights import parameters_of, put_weights
from hf_epimer.pipeline.calibration.passage import CalibrationTask
from hf_epimer.pipeline.calibration.step import calibrate
from hf_epimer.tasks.images import Batch, ImageBatches, Samples, read_samples
from hf_epimer.tasks.task import load_task_file

Tensors = dict[str, Tensor]
Hits = dict[str, Tensor]
"""Task -> which pictures were classified correctly."""


@dataclass(frozen=True)
class Look:
    """How curvature is measured and on which pictures.

    Attributes:
        samples: per task.
        part: the pictures begin `part` times 256 after the first, so that parts of 256 have none in common.
        labels: true ones, or sampled from the model's own predictions.
        temperature: by which logits are divided.
        at: the weights at which the loss is looked at; None for each task's own.
    """

    samples: int = 256
    part: int = 0
    labels: Labels = "true"
    temperature: float = 1.0
    at: Tensors | None = field(default=None, compare=False)


USUAL = Look()


class Bench:
    """One set of tasks of one zoo: DIR/base, DIR/tasks/NAME or DIR/NAME, DIR/task_files/NAME.yaml or DIR/tasks/..."""

    def __init__(self, zoo: Path, tasks: Sequence[str], limit: int) -> None:
        nested = (zoo / "task_files").is_dir()
        self.names, self.limit = list(tasks), limit
        folders = [zoo / "tasks" / name if nested else zoo / name for name in tasks]
        home = resolve_model(ModelRef(str((zoo / "base").absolute()), label="base"))
        self.tower = load_tower(zoo / "base")
        self.base = _weights(self.tower)
        self.tuned = [_weights(load_tower(folder)) for folder in folders]
        self.samples: list[Samples] = []
        self.models: list[Classifier] = []  # all of one tower
        for name in tasks:
            task = load_task_file(zoo / ("task_files" if nested else "tasks") / f"{name}.yaml")
            self.samples.append(read_samples(task, task.train_split, seed=0))
            self.models.append(classifier_for(self.tower, home, home, task, self.samples[-1].class_names))
        self._statistics: dict[tuple[StatisticsFile | None, Look], list[Tensors]] = {}

    def pictures(self, number: int, start: int, count: int) -> ImageBatches:
        """Some pictures of a task, in its seeded order."""
        everything = self.samples[number]
        if start + count > len(everything) - self.limit:
            raise ValueError(f"{self.names[number]} has no {count} pictures from {start} on beside those of validation")
        chosen = range(start, start + count)
        part = replace(everything, rows=everything.rows.select(chosen), numbers=[everything.numbers[n] for n in chosen])
        return ImageBatches(part, self.models[number].pixels, 32)

    def looked_at(self, number: int, look: Look) -> ImageBatches:
        """The pictures on which something is measured."""
        return self.pictures(number, 256 * look.part, look.samples)

    @cached_property
    def validation(self) -> list[list[Batch]]:
        """The last pictures of every task."""
        all_batches = []
        for model, everything in zip(self.models, self.samples, strict=True):
            rows = range(len(everything) - self.limit, len(everything))
            part = replace(everything, rows=everything.rows.select(rows), numbers=everything.numbers[rows.start :])
            all_batches.append(list(ImageBatches(part, model.pixels, 50)))
        return all_batches

    def statistics(self, statistic: StatisticKind, look: Look = USUAL) -> list[Tensors]:
        """One mapping per task, named as in files."""
        if look.at is None and (statistic.file, look) in self._statistics:
            return self._statistics[statistic.file, look]
        statistics = []
        for number in range(len(self.names)):
            assert statistic.file is not None
            made = ACCUMULATORS[statistic.file, "per-sample"]
            statistics.append(self.swept(number, made(self._subject(number, look).shapes), look))
        if look.at is None:
            self._statistics[statistic.file, look] = statistics
        return statistics

    def swept(self, number: int, accumulator: Accumulator, look: Look = USUAL) -> Tensors:
        """Per-sample gradients of one task's loss, in an accumulator."""
        self.put(self.tuned[number] if look.at is None else look.at)
        pictures = self.looked_at(number, look)
        return accumulate(self._subject(number, look), pictures, accumulator, labels=look.labels)[0]

    def _subject(self, number: int, look: Look) -> Subject:
        model = self.models[number]
        return Subject(model, model.tower_names(), lambda forward, inputs: forward(inputs) / look.temperature)

    def merge(self, method: str, options: Mapping[str, Any], look: Look = USUAL) -> Tensors:
        """By a method from METHODS."""
        config = METHODS[method].config(**options)
        needs = METHODS[method].statistic(config)
        measured = self.statistics(needs, look) if needs else None
        return merge_state_dicts(self.base, self.tuned, method, config, measured, labels=self.names)

    def calibrated(self, merged: Tensors, look: Look = USUAL, **options: Any) -> Tensors:
        """A merge, calibrated."""
        self.put(merged)
        curvature = self.statistics(POSITIONS, look)
        self.put(merged)
        share = 1 / len(self.names)
        tasks = [
            CalibrationTask(StateDict(name, tuned), share, StateDict(name, factors), self.looked_at(number, look))
            for number, (name, tuned, factors) in enumerate(zip(self.names, self.tuned, curvature, strict=True))
        ]
        with tempfile.TemporaryDirectory() as folder:
            calibrate(self.tower, StateDict("base", self.base), tasks, CLIP, Path(folder), **options)
        return _weights(self.tower)

    def scaled(self, merged: Tensors, alpha: float) -> Tensors:
        """theta_0 + alpha (merged - theta_0)."""
        return {name: self.base[name] + alpha * (value - self.base[name]) for name, value in merged.items()}

    def measure(self, merged: Tensors) -> Hits:
        """Picture by picture."""
        self.put(merged)
        hits = {}
        with torch.inference_mode():
            for name, model, batches in zip(self.names, self.models, self.validation, strict=True):
                hits[name] = torch.cat([model.top1(batch.inputs) == batch.labels for batch in batches])
        return hits

    def losses(self, merged: Tensors) -> tuple[float, float]:
        """What can be known of a merge without validation: means over tasks on 128 calibration pictures each, in nats.

        Returns:
            KL(fine-tuned || merged) of the predicted classes, and the cross-entropy with the true ones.
        """
        usual = self.predictions  # of other weights: before these are put
        self.put(merged)
        apart = loss = 0.0
        for model, batches, theirs in zip(self.models, self.first, usual, strict=True):
            ours = _log_probabilities(model, batches)
            apart += float(kl_div(ours, theirs, reduction="batchmean", log_target=True))
            loss += float(nll_loss(ours, torch.cat([batch.labels for batch in batches])))
        return apart / len(self.models), loss / len(self.models)

    @cached_property
    def first(self) -> list[list[Batch]]:
        """The first 128 calibration pictures of every task."""
        return [list(self.pictures(number, 0, 128)) for number in range(len(self.names))]

    @cached_property
    def predictions(self) -> list[Tensor]:
        """Log-probabilities of these by each task's own model."""
        predictions = []
        for model, tuned, batches in zip(self.models, self.tuned, self.first, strict=True):
            self.put(tuned)
            predictions.append(_log_probabilities(model, batches))
        return predictions

    def put(self, weights: Tensors) -> None:
        """Into the tower of all classifiers."""
        put_weights(parameters_of(self.tower, CLIP), StateDict("weights", weights))


def average(hits: Hits) -> float:
    """Mean accuracy over tasks."""
    return sum(float(right.float().mean()) for right in hits.values()) / len(hits)


def worst(hits: Hits) -> float:
    """Accuracy on the worst task."""
    return min(float(right.float().mean()) for right in hits.values())


def difference(one: Hits, two: Hits) -> tuple[float, float]:
    """Mean over tasks of accuracy(one) - accuracy(two) on the same pictures, and its standard error."""
    apart = [one[task].float() - two[task].float() for task in one]
    mean = sum(float(pairs.mean()) for pairs in apart) / len(apart)
    variance = sum(float(pairs.var()) / len(pairs) for pairs in apart) / len(apart) ** 2
    return mean, math.sqrt(variance)


@torch.inference_mode()
def _log_probabilities(model: Classifier, batches: Iterable[Batch]) -> Tensor:
    return torch.cat([model(batch.inputs) for batch in batches]).log_softmax(-1)


def _weights(tower: nn.Module) -> Tensors:
    return {name: value.detach().clone() for name, value in parameters_of(tower, CLIP).items()}
