"""Classifiers from folders, the way the package makes them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from hf_epimer.hub.refs import ModelRef
from hf_epimer.models.classifier import Classifier, ZeroShotHead
from hf_epimer.models.head import classifier_for, load_head
from hf_epimer.models.loading import load_tower
from hf_epimer.models.source import ModelSource, resolve_model
from hf_epimer.tasks.task import Task


def source_of(folder: Path) -> ModelSource:
    """A local folder as a resolved reference."""
    return resolve_model(ModelRef(str(folder)))


def load_classifier(folder: Path, base: Path, task: Task, class_names: tuple[str, ...]) -> Classifier:
    """The tower of a checkpoint or adapter behind the head of a task."""
    return classifier_for(load_tower(folder, source_of(base)), source_of(folder), source_of(base), task, class_names)


def zero_shot_rows(base: Path, class_names: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
    """The zero-shot head of these classes: [classes, d]."""
    head = load_head(source_of(base), source_of(base), Task("any", "org/any", templates=templates), class_names)
    assert isinstance(head, ZeroShotHead)
    return head.rows
