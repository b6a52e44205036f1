"""Whether a model is worse at a task than its base is without any training on it.

Then it was not fine-tuned on these images, labels or class names: some copies of EMNIST, for one, hold the letters
lying on their side. Curvature and calibration on such images make a merge worse, and no other number tells.
"""

from __future__ import annotations

import logging
import math
from itertools import islice

from hf_epimer.models.classifier import Classifier, ZeroShotHead
from hf_epimer.models.loading import load_tower
from hf_epimer.models.source import ModelSource
from hf_epimer.tasks.images import ImageBatches
from hf_epimer.types import Precision

logger = logging.getLogger(__name__)

BELIEVED = 0.5
"""Whoever is right about such a share of the first batch has been trained on the task: nothing more is looked at."""

ENOUGH = 256
"""Images that the two are compared on."""


def warn_if_below_zero_shot(
    model: Classifier, name: str, base: ModelSource, batches: ImageBatches, precision: Precision = "no"
) -> None:
    """One line where the base is right about more of the images: by two standard errors, counted on the same images.

    Args:
        model: behind a zero-shot head; with any other, there is nothing to compare.
        name: it is called in the line.
        batches: in any order but that of the classes.
        precision: of the towers' products.
    """
    if not isinstance(model.head, ZeroShotHead):
        return
    first = next(iter(batches), None)
    if first is None or float((model.top1(first.inputs, precision) == first.labels).float().mean()) >= BELIEVED:
        return
    tower = load_tower(base.folder(), base).to(next(model.tower.parameters()).device)
    zero_shot = model.with_tower(tower)
    images = right = lost = gained = 0
    for batch in islice(batches, max(1, ENOUGH // batches.size)):
        of_model, of_base = (each.top1(batch.inputs, precision) == batch.labels for each in (model, zero_shot))
        images += len(batch.labels)
        right += int(of_model.sum())
        lost += int((of_base & ~of_model).sum())
        gained += int((of_model & ~of_base).sum())
    if lost - gained > 2 * math.sqrt(lost + gained):  # McNemar's test
        task = batches.samples.task.name
        logger.warning(
            "%s is right about %d of %d images of %s, its base without training about %d: are the images (turned?), "
            "the labels and the class names those that it was fine-tuned on?",
            name, right, images, task, right + lost - gained,
        )  # fmt: skip
