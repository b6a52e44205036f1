"""Accuracies as data: per task, average, worst, results.json. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from hf_epimer.types import Precision

Z = 1.96
"""Of a 95% interval."""


@dataclass(frozen=True)
class TaskResult:
    """One checkpoint on one task; `confusion[i][j]` counts samples of class i taken for class j."""

    correct: int
    samples: int
    class_names: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    @property
    def accuracy(self) -> float:
        """Share of hits."""
        return self.correct / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        return wilson(self.correct, self.samples)

    def per_class(self) -> dict[str, float | None]:
        """Accuracy within each class; None where the split has no sample of it."""
        totals = [sum(row) for row in self.confusion]
        return {
            name: row[index] / total if total else None
            for index, (name, row, total) in enumerate(zip(self.class_names, self.confusion, totals, strict=True))
        }


def wilson(correct: int, samples: int) -> tuple[float, float]:
    """The 95% interval of a share k / N."""
    centre = correct + Z**2 / 2
    half = Z * math.sqrt(correct * (samples - correct) / samples + Z**2 / 4)
    return max(0.0, (centre - half) / (samples + Z**2)), min(1.0, (centre + half) / (samples + Z**2))


@dataclass(frozen=True)
class Split:
    """Which images of a data set: its Hub id or a local folder's name, its config if it has several, and the split."""

    dataset: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Results:
    """One checkpoint on several tasks; `to_json()` is results.json.

    Attributes:
        model, base: as they are called in cards.
        tasks: by name.
        measured_on: task -> the images, for the card.
        fine_tuned: task -> accuracy of the fine-tuned model, where it is known.
        zero_shot: whether all classes were made out of texts; otherwise some tasks brought their own heads.
        of_base: task -> accuracy of the base, where it is known.
        precision: of the passes.
    """

    model: str
    base: str
    tasks: dict[str, TaskResult]
    measured_on: dict[str, Split]
    fine_tuned: dict[str, float] = field(default_factory=dict)
    zero_shot: bool = True
    of_base: dict[str, float] = field(default_factory=dict)
    precision: Precision = "no"

    @property
    def accuracies(self) -> dict[str, float]:
        """Task -> accuracy."""
        return {task: row.accuracy for task, row in self.tasks.items()}

    @property
    def average(self) -> float:
        """Mean accuracy over tasks."""
        return fmean(row.accuracy for row in self.tasks.values())

    @property
    def worst(self) -> str:
        """The task with the lowest accuracy."""
        return min(self.tasks, key=lambda task: self.tasks[task].accuracy)

    @property
    def normalized(self) -> dict[str, float]:
        """Accuracy over the fine-tuned model's, for tasks where that is known and not 0."""
        known = {task: accuracy for task, accuracy in self.fine_tuned.items() if task in self.tasks and accuracy > 0}
        return {task: self.tasks[task].accuracy / accuracy for task, accuracy in known.items()}

    def to_json(self, per_class: bool = False) -> dict[str, Any]:
        """Plain values; with `per_class` also the accuracy within each class."""
        rows: dict[str, dict[str, Any]] = {}
        for task, row in self.tasks.items():
            rows[task] = {"accuracy": row.accuracy, "correct": row.correct, "samples": row.samples}
            rows[task]["interval"] = list(row.interval)
            for whose, accuracies in (("base", self.of_base), ("fine_tuned", self.fine_tuned)):
                if task in accuracies:
                    rows[task][whose] = accuracies[task]
            if task in self.normalized:
                rows[task]["normalized"] = self.normalized[task]
            if per_class:
                rows[task]["per_class"] = row.per_class()
        content: dict[str, Any] = {"model": self.model, "base": self.base, "tasks": rows, "average": self.average}
        content["worst"] = {"task": self.worst, "accuracy": self.tasks[self.worst].accuracy}
        if len(self.normalized) == len(self.tasks):
            content["normalized_average"] = fmean(self.normalized.values())
        return content | {"mixed_precision": self.precision}
