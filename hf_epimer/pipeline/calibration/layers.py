"""The calibration of a planned merge: its tower and images, and a workspace that a killed run is gone on with.

The workspace lies in the package's folder of HF_HOME under a name made of everything that decides the result: the merge
that is calibrated, the images and the settings. It is removed at the end, and by age.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import constants

from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.errors import OutputError
from hf_epimer.merging.finite import stored_as
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.report import CalibrationReport
from hf_epimer.merging.stream import MergedLayer
from hf_epimer.models.loading import load_processor, load_tower, preprocess
from hf_epimer.models.weights import parameters_of, put_weights
from hf_epimer.pipeline.calibration.states import BATCH
from hf_epimer.pipeline.calibration.step import CalibrationTask, calibrate
from hf_epimer.pipeline.plan import Plan
from hf_epimer.tasks.images import ImageBatches, read_images
from hf_epimer.types import Progress

logger = logging.getLogger(__name__)

KEPT = 7 * 24 * 3600
"""Seconds after which what an interrupted run has left is removed."""


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
    layers = {layer.name: layer for layer in merged}
    start = {name: layer.tensor for name, layer in layers.items()}
    tower = load_tower(plan.base.folder_with_tokenizer())
    put_weights(parameters_of(tower, plan.architecture), StateDict("merge", start))
    pixels = partial(preprocess, load_processor(plan.base.folder_with_processor()))
    batches = [ImageBatches(read_images(model.images), pixels, BATCH) for model in plan.models if model.images]
    tasks = [
        CalibrationTask(*entry)
        for entry in zip(ingredients.models, plan.weights, ingredients.curvature, batches, strict=True)
    ]
    workspace = _workspace(plan, start)
    _check_room(plan, workspace)
    sizes = calibrate(
        tower.to(plan.recipe.device),
        ingredients.base,
        tasks,
        plan.architecture,
        workspace,
        views=plan.recipe.views,
        rho=plan.recipe.calibration_rho,
        on_step=lambda done, total: progress("calibrating", done, total),
    )
    shutil.rmtree(workspace)
    for seen in batches:
        seen.report_broken()
    parameters = parameters_of(tower.cpu(), plan.architecture)
    for name, layer in layers.items():
        value = parameters[name].detach()
        stored = stored_as(value, layer.tensor.dtype, name)
        norm = float((value - ingredients.base.tensor(name).to(value)).norm())
        change = CalibrationReport(sizes[name]) if name in sizes else None
        yield MergedLayer(name, stored, replace(layer.report, merged_norm=norm, calibration=change))


def _workspace(plan: Plan, start: Mapping[str, torch.Tensor]) -> Path:
    """The folder of this calibration; those of others that were left long ago are removed."""
    digest = hashlib.sha256()
    for name, tensor in start.items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    settings = [plan.recipe.views, plan.recipe.calibration_rho, plan.recipe.device, torch.get_num_threads()]
    sources = [(model.label, model.weight, model.source.identity, str(model.images)) for model in plan.models]
    revisions = [model.images.revision for model in plan.models if model.images]
    digest.update(repr((settings, sources, revisions)).encode())
    home = Path(constants.HF_HOME) / "hf-epimer" / "calibration"
    for other in home.glob("*"):
        if time.time() - other.stat().st_mtime > KEPT:
            shutil.rmtree(other, ignore_errors=True)
    return home / digest.hexdigest()[:24]


def _check_room(plan: Plan, workspace: Path) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OutputError: naming the folder and what is needed.
    """
    workspace.mkdir(parents=True, exist_ok=True)
    needed, free = plan.calibration_bytes, shutil.disk_usage(workspace).free
    held = sum(file.stat().st_size for file in workspace.rglob("*") if file.is_file())
    logger.info("calibration keeps %.1f GB of hidden states in %s until it is done", needed / 1e9, workspace)
    if needed - held > free:
        raise OutputError(
            f"calibration needs {needed / 1e9:.1f} GB for hidden states in {workspace}, and {free / 1e9:.1f} GB are "
            "free: make room, set HF_HOME to another disk, or take fewer --samples"
        )
