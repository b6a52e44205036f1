"""What a checkpoint sees in a picture: `predict(model, images, task)`.

p_c = softmax_c(exp(logit_scale) * <z, t_c>)          z, t_c as in `classifier`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hf_epimer.errors import UsageError
from hf_epimer.hub.refs import ModelRef
from hf_epimer.models.head import classifier_for, home_of
from hf_epimer.models.loading import load_tower
from hf_epimer.models.source import resolve_model
from hf_epimer.tasks.images import read_samples
from hf_epimer.tasks.task import Task, find_task

if TYPE_CHECKING:
    from PIL.Image import Image


@torch.inference_mode()
def predict(
    model: str | ModelRef, images: Sequence[Image], task: str | Task, base: str | ModelRef | None = None
) -> list[dict[str, float]]:
    """Probabilities of a task's classes for pictures, by a checkpoint from the Hub or a folder.

    Args:
        model: a reference; that of the base itself gives its zero-shot guess.
        images: of any mode and size.
        task: a built-in name, a task file or a `Task`; of the latter, only class names and templates (or the head) are
            looked at where it has them.
        base: whose text tower and image processor are used; None as in `evaluate`.

    Returns:
        For every picture: class -> probability, the most probable first.

    Raises:
        EpimerError: whatever is wrong with the checkpoint, the base or the task.
    """
    if not images:
        raise UsageError("give at least one picture")
    chosen = task if isinstance(task, Task) else find_task(task)
    names = chosen.class_names or read_samples(chosen, chosen.test_split, limit=1).class_names
    source = resolve_model(ModelRef.parse(model) if isinstance(model, str) else model)
    home = home_of(source, ModelRef.parse(base) if isinstance(base, str) else base, [chosen])
    classifier = classifier_for(load_tower(source.folder(), home), source, home, chosen, names)
    probabilities = classifier(classifier.pixels(images)).softmax(-1).tolist()
    return [dict(sorted(zip(names, row, strict=True), key=lambda pair: -pair[1])) for row in probabilities]
