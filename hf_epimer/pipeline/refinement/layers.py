"""The refinement of a planned merge: its tower, its images, and its layers."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.lora import MergedUpdate, fold_updates
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.stream import MergedLayer
from hf_epimer.models.head import load_head
from hf_epimer.models.loading import load_processor, preprocess
from hf_epimer.models.weights import parameters_of
from hf_epimer.numerics.lowrank import LowRank, factorize
from hf_epimer.pipeline.plan import Plan
from hf_epimer.pipeline.processes import launched
from hf_epimer.pipeline.refinement.pictures import BATCH
from hf_epimer.pipeline.refinement.training import PICTURES, RATE, VIEWS, RefinementTask, refine
from hf_epimer.pipeline.report import RefinementReport
from hf_epimer.pipeline.tower import tower_of, with_weights_of
from hf_epimer.pipeline.workspace import workspace_of
from hf_epimer.tasks.images import ImageBatches, read_images
from hf_epimer.types import Progress

logger = logging.getLogger(__name__)


def refined_layers(
    merged: Iterable[MergedLayer], plan: Plan, ingredients: Ingredients, progress: Progress
) -> tuple[list[MergedLayer], RefinementReport]:
    """A merge's layers, refined, and what that has brought.

    Args:
        merged: every parameter of the tower.
        plan: with a refinement.

    Raises:
        DataError: what is wrong with the images of a task.
        OutputError: there is no room for the pictures.
        NumericalError: the loss is not finite, or a value does not fit into the merge's type.
    """
    tower, outlines = tower_of(merged, plan)
    report = _refined(tower, plan, ingredients, progress)
    return list(with_weights_of(tower, outlines, plan, ingredients.base)), report


def refined_updates(
    merged: Iterable[MergedUpdate], plan: Plan, ingredients: Ingredients, progress: Progress
) -> tuple[list[MergedUpdate], RefinementReport]:
    """The same of a merged adapter, whose updates keep their ranks.

    Raises:
        DataError, OutputError, NumericalError: as in `refined_layers`.
    """
    updates = list(merged)
    tower, _ = tower_of(fold_updates(updates, ingredients.base, torch.float32), plan)
    trained = {each.name: each.update for each in updates if not isinstance(each.update, LowRank) or each.update.rank}
    report = _refined(tower, plan, ingredients, progress, trained)
    parameters = parameters_of(tower, plan.architecture)
    moved = trained if report.best_step else {}
    return [
        _moved(each, parameters[each.name].detach().cpu(), ingredients.base) if each.name in moved else each
        for each in updates
    ], report


def _moved(merged: MergedUpdate, weight: Tensor, base: TensorSource) -> MergedUpdate:
    """An update that leads from the base to a weight, of the rank that it had."""
    update = weight.double() - base.tensor(merged.name).double()
    report = replace(merged.report, merged_norm=float(update.norm()))
    if not isinstance(merged.update, LowRank):
        return replace(merged, update=update, report=report)
    return replace(merged, update=factorize(update.flatten(1)).truncated(merged.update.rank), report=report)


def _refined(
    tower: nn.Module,
    plan: Plan,
    ingredients: Ingredients,
    progress: Progress,
    updates: Mapping[str, LowRank | Tensor] | None = None,
) -> RefinementReport:
    """Train a merged tower in place; `updates` as in `refine`."""
    recipe, processes = plan.recipe, launched()
    device = processes.device(recipe.device)
    pixels = partial(preprocess, load_processor(plan.base.folder_with_processor()))
    batches, tasks = [], []
    for model, tuned in zip(plan.models, ingredients.models, strict=True):
        assert model.images  # by the planner
        samples = read_images(model.images)
        head = load_head(model.source, plan.base, model.images.task, samples.class_names).to(device)
        learnt = plan.learnt_from(len(samples))
        images = ImageBatches(samples, pixels, BATCH, only=learnt)
        held_out = ImageBatches(samples, pixels, BATCH, only=range(len(learnt), len(samples)))
        batches += [images, held_out]
        tasks.append(RefinementTask(model.label, tuned, model.weight, images, held_out, head))
    settings = [recipe.refine_steps, recipe.seed, RATE, PICTURES, VIEWS]
    content = "pictures and weights"
    start = parameters_of(tower, plan.architecture)
    with workspace_of("refinement", plan, start, settings, plan.refinement_bytes, content) as workspace:
        report = refine(
            tower.to(device),
            tasks,
            plan.architecture,
            workspace,
            steps=recipe.refine_steps,
            updates=updates,
            seed=recipe.seed,
            processes=processes,
            on_step=lambda done, total: progress("refining", done, total),
        )
        if processes.is_main:
            shutil.rmtree(workspace)
    for seen in batches:
        seen.report_broken()
    if not report.best_step:
        logger.warning("refinement brought the merge no nearer to its models; it is left as it was")
    return report
