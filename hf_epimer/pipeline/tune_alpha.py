"""`--tune-alpha`: the scale at which a merge predicts most like the models it was made of. No label is looked at.

    alpha = argmin over ALPHAS of  sum_t l_t mean_n KL(p_t(x_n) || p_alpha(x_n))

over training images n of task t, with p_t the class probabilities of task t's own model and p_alpha those of
theta_0 + alpha tau, both behind the same frozen head. Every method that has an alpha is linear in it, so tau is solved
once for all of them, and the merge again at the one that is chosen. docs/study.md has how near this comes to the alpha
that is best on labelled validation images.

Memory: four towers in float32, and the pictures of one task.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.models.classifier import Classifier
from hf_epimer.models.head import classifier_for
from hf_epimer.models.loading import load_tower
from hf_epimer.models.weights import parameters_of, put_weights
from hf_epimer.pipeline.output import dense_layers
from hf_epimer.pipeline.plan import Plan
from hf_epimer.tasks.images import Batch, ImageBatches, read_images
from hf_epimer.types import Progress

logger = logging.getLogger(__name__)

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
"""What is tried."""

BATCH = 32
"""Images at a time."""


@torch.inference_mode()
def divergences(plan: Plan, ingredients: Ingredients, progress: Progress) -> dict[float, float]:
    """How far the merge's predictions are from those of the fine-tuned models at every alpha, in nats.

    Args:
        plan: with images; the alpha of its options does not matter.

    Raises:
        DataError: what is wrong with the images of a task.
    """
    progress("choosing alpha", 0, len(plan.models))
    merged = dense_layers(plan.at_alpha(1.0), ingredients, torch.float32, lambda stage, done: None)
    base = {name: ingredients.base.tensor(name).float() for name in plan.shapes}
    tau = {layer.name: layer.tensor - base[layer.name] for layer in merged}
    tower = load_tower(plan.base.folder_with_tokenizer()).to(plan.recipe.device)
    parameters = parameters_of(tower, plan.architecture)
    divergence = dict.fromkeys(ALPHAS, 0.0)
    for planned, model in zip(plan.models, ingredients.models, strict=True):
        assert planned.images  # by the planner
        samples = read_images(planned.images)
        classifier = classifier_for(tower, planned.source, plan.base, planned.images.task, samples.class_names)
        classifier = classifier.to(plan.recipe.device)
        pictures = ImageBatches(samples, classifier.pixels, BATCH)
        batches = list(pictures)
        pictures.report_broken()
        put_weights(parameters, model)
        tuned = _log_probabilities(classifier, batches)
        for alpha in ALPHAS:
            put_weights(parameters, StateDict("merge", {name: base[name] + alpha * step for name, step in tau.items()}))
            merge = _log_probabilities(classifier, batches)
            divergence[alpha] += planned.weight * float(kl_div(merge, tuned, reduction="batchmean", log_target=True))
        progress("choosing alpha", 1, len(plan.models))
    return divergence


def nearest(tried: Mapping[float, float]) -> float:
    """The alpha of the smallest divergence; a warning where it is at the end of what was tried."""
    alpha = min(tried, key=tried.__getitem__)
    if alpha in (ALPHAS[0], ALPHAS[-1]):
        logger.warning("--tune-alpha: %g is at the end of what was tried; an alpha beyond it may do better", alpha)
    return alpha


def _log_probabilities(classifier: Classifier, batches: list[Batch]) -> Tensor:
    return torch.cat([classifier(batch.inputs).float().log_softmax(-1) for batch in batches])
