"""The calibration of a planned merge: its tower, its images, and its layers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.report import CalibrationReport
from hf_epimer.merging.stream import MergedLayer
from hf_epimer.models.loading import load_processor, preprocess
from hf_epimer.models.transfer import has_room
from hf_epimer.models.weights import parameters_of
from hf_epimer.pipeline.calibration.passage import CalibrationTask
from hf_epimer.pipeline.calibration.states import BATCH
from hf_epimer.pipeline.calibration.step import calibrate
from hf_epimer.pipeline.plan import Plan
from hf_epimer.pipeline.processes import launched
from hf_epimer.pipeline.tower import tower_of, with_weights_of
from hf_epimer.pipeline.workspace import workspace_of
from hf_epimer.tasks.images import ImageBatches, read_images
from hf_epimer.types import Progress


def calibrated_layers(
    merged: Iterator[MergedLayer], plan: Plan, ingredients: Ingredients, progress: Progress
) -> Iterator[MergedLayer]:
    """A merge's layers, calibrated: all of them are taken before the first is given.

    Args:
        merged: every parameter of the tower.
        plan: with a calibration.

    Raises:
        DataError: what is wrong with the images of a task.
        OutputError: there is no room for hidden states.
        NumericalError: as in `calibrate`, or a value that does not fit into the merge's type.
    """
    tower, outlines = tower_of(merged, plan)
    pixels = partial(preprocess, load_processor(plan.base.folder_with_processor()))
    processes = launched()
    share = (processes.rank, processes.count)
    samples = [read_images(model.images) for model in plan.models if model.images]
    batches = [ImageBatches(chosen, pixels, BATCH, share, plan.learnt_from(len(chosen))) for chosen in samples]
    tasks = [
        CalibrationTask(*entry)
        for entry in zip(ingredients.models, plan.weights, ingredients.curvature, batches, strict=True)
    ]
    recipe = plan.recipe
    device = torch.device(processes.device(recipe.device))
    in_memory = has_room(device, plan.calibration_bytes // 2 // processes.count)
    settings = [recipe.views, recipe.calibration_rho, recipe.mixed_precision, recipe.refine, share, in_memory]
    start, needed = parameters_of(tower, plan.architecture), 0 if in_memory else plan.calibration_bytes
    with workspace_of("calibration", plan, start, settings, needed, "hidden states") as workspace:
        sizes = calibrate(
            tower.to(device),
            ingredients.base,
            tasks,
            plan.architecture,
            workspace,
            in_memory=in_memory,
            views=recipe.views,
            rho=recipe.calibration_rho,
            precision=recipe.mixed_precision,
            processes=processes,
            on_step=lambda done, total: progress("calibrating", done, total),
        )
        shutil.rmtree(workspace)
    for seen in batches:
        seen.report_broken()
    for layer in with_weights_of(tower, outlines, plan, ingredients.base):
        change = CalibrationReport(sizes[layer.name]) if layer.name in sizes else None
        yield replace(layer, report=replace(layer.report, calibration=change))
