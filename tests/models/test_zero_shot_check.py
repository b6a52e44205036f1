"""A model that knows less of its task than its base: said once, and not of one that does as well."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.classifiers import load_classifier, source_of
from helpers.data import CLASSES
from hf_epimer.models.classifier import Classifier
from hf_epimer.models.zero_shot_check import warn_if_below_zero_shot
from hf_epimer.tasks.images import ImageBatches, read_samples
from hf_epimer.tasks.task import load_task_file

pytestmark = pytest.mark.usefixtures("own_home")


def labelled_by(teacher: Classifier, zoo: Path) -> ImageBatches:
    """The test images of a task, each with the class that a model gives it."""
    task = load_task_file(zoo / "a.json")
    samples = read_samples(task, "test")
    batches = ImageBatches(samples, teacher.pixels, 16)
    guesses = torch.cat([teacher.top1(batch.inputs) for batch in batches]).tolist()
    rows = [row | {task.label_column: label} for row, label in zip(samples.rows, guesses, strict=True)]
    return replace(batches, samples=replace(samples, rows=rows))


@pytest.mark.parametrize("is_worse", [True, False])
def test_a_model_below_zero_shot_is_a_warning(clip_zoo: Path, is_worse: bool, caplog: pytest.LogCaptureFixture) -> None:
    base = clip_zoo / "base"
    task = load_task_file(clip_zoo / "a.json")
    ignorant, knowing = (load_classifier(base, base, task, CLASSES) for _ in range(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for parameter in ignorant.tower.parameters():
            parameter.data = torch.randn_like(parameter)
    teacher, model = (knowing, ignorant) if is_worse else (ignorant, ignorant)
    with caplog.at_level(logging.WARNING):
        warn_if_below_zero_shot(model, "org/b", source_of(base), labelled_by(teacher, clip_zoo))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == is_worse
    assert all("org/b is right about" in line and "its base without training about 40" in line for line in lines)
