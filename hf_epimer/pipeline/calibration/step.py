"""Calibration: a merge's linear layers solved again in forward order, on images of every task.

A merge is made layer by layer from weights, so every layer meets inputs that its neighbours have changed and nobody
told it about. Calibration goes through the merged tower from front to back. At each linear layer, x is what the merged
tower gives it on images of task t, y what task t's own tower makes of the same images there:

    minimise sum_t g_t sum_{n, s} pi_ts (y_ns - (W + E) x_ns)^T S_t (y_ns - (W + E) x_ns) + rho |E|^2

with g_t = l_t over the mean squared input, S_t the curvature of task t's loss in the layer's outputs (Kronecker factor)
and pi_ts how much of it sits at position s of the sequence; without pi the last block would be fitted to patches that
nobody reads. Where the output is added to the residual stream, y contains what the stream itself is off by. Biases
belong to W (x has a 1 in it). Labels enter through S_t and pi alone. `hf_epimer.numerics.regression` solves it. Every
image is seen `VIEWS` times, whole and as random crops (`states.py`). The constants below were chosen on validation
images of a small zoo; docs/study.md has what half or three times of them changes.

Related: RegMean (inputs of the tuned towers, S_t = I, pi = 1, all layers at once), RegMean++ (inputs of merged layers).

Memory: two towers, the sums of one layer, and the hidden states of all images in files that are mapped into memory.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_epimer.checkpoints.reader import StateDict, TensorSource
from hf_epimer.merging.finite import check_merged, stored_as
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.report import CalibrationReport
from hf_epimer.merging.stream import MergedLayer
from hf_epimer.models.architecture import Architecture, Stage
from hf_epimer.models.files import base_folder, processor_folder
from hf_epimer.models.loading import load_processor, load_tower, preprocess
from hf_epimer.models.weights import Block, blocks_of, parameters_of, put_weights
from hf_epimer.numerics.regression import anchored_step
from hf_epimer.pipeline.calibration.states import BATCH, Run, caught, start_run, stopped
from hf_epimer.pipeline.plan import Plan
from hf_epimer.tasks.images import Batch, ImageBatches, read_images
from hf_epimer.types import Progress

VIEWS = 4
"""How often every image is seen: whole, and as random crops."""

RHO = 0.1
"""How strongly a layer is held at its merge, in units of the mean squared input."""

SHARE = 0.8
"""Of S_t in its mixture with the identity."""

OnStep = Callable[[int, int], None]
"""(steps done since the last call, steps in all)."""


@dataclass(frozen=True)
class CalibrationTask:
    """What calibration reads of one task: its weights, the curvature of its outputs, and its images, read once."""

    tuned: TensorSource
    curvature: TensorSource
    images: Iterable[Batch]


@torch.no_grad()
def calibrate(
    tower: nn.Module,
    tasks: Sequence[CalibrationTask],
    weights: Sequence[float],
    architecture: Architecture,
    workspace: Path,
    *,
    views: int = VIEWS,
    rho: float = RHO,
    share: float = SHARE,
    on_step: OnStep = lambda done, total: None,
) -> dict[str, CalibrationReport]:
    """Solve every linear layer of a merged tower again, in place.

    Args:
        tower: the merge, in evaluation mode, on the device where it is to be done.
        tasks: one per merged checkpoint.
        weights: l_t, summing to 1.
        workspace: a folder for hidden states of both towers: 8 bytes times images, views, positions and width.
        views: of every image, at least 1.
        rho, share: as above; layers are solved in float32, so rho should stay well above 1e-4.
        on_step: progress; a step is one task in one stage of one block.

    Returns:
        Canonical name of every solved weight -> how its solve went.

    Raises:
        DataError: a task has no images.
        NumericalError: a solution is not finite.
    """
    other = copy.deepcopy(tower)  # takes the tuned weights of one task after the other
    blocks, tuned_blocks = blocks_of(tower, architecture), blocks_of(other, architecture)
    total = len(blocks) * len(architecture.stages) * len(tasks)
    on_step(0, total)
    first = blocks[0], tuned_blocks[0]
    runs = [
        start_run((tower, other), first, task.tuned, task.images, views, architecture, workspace / str(number))
        for number, task in enumerate(tasks)
    ]
    reports: dict[str, CalibrationReport] = {}
    for block, tuned in zip(blocks, tuned_blocks, strict=True):
        for stage in architecture.stages:
            sums = []
            for task, run in zip(tasks, runs, strict=True):
                put_weights(tuned.parameters, task.tuned)
                profiles = {name: _profile(task, f"{block.name}.{name}") for name in stage.layers}
                sums.append(_moments(block, tuned, stage, run, profiles, is_last=stage is architecture.stages[-1]))
                on_step(1, total)
            for name in stage.layers:
                layer = f"{block.name}.{name}"
                curvature = [task.curvature.tensor(f"{layer}.weight.output_factor") for task in tasks]
                moments = [of_task[name] for of_task in sums]
                reports[f"{layer}.weight"] = _solve(block.layers[name], moments, curvature, weights, rho, share, layer)
        for run in runs:
            run.advance(block)
    return reports


def calibrated_layers(
    merged: Iterator[MergedLayer], plan: Plan, ingredients: Ingredients, folder: Path, progress: Progress
) -> Iterator[MergedLayer]:
    """A merge's layers, calibrated: all of them are taken before the first is given.

    Args:
        merged: every parameter of the tower.
        plan: with a calibration.
        folder: where hidden states can be kept meanwhile.

    Raises:
        DataError: what is wrong with the images of a task.
        NumericalError: as in `calibrate`, or a value that does not fit into the merge's type.
    """
    layers = {layer.name: layer for layer in merged}
    tower = load_tower(base_folder(plan.base))
    put_weights(
        parameters_of(tower, plan.architecture),
        StateDict("merge", {name: layer.tensor for name, layer in layers.items()}),
    )
    pixels = partial(preprocess, load_processor(processor_folder(plan.base)))
    images = [ImageBatches(read_images(model.images), pixels, BATCH) for model in plan.models if model.images]
    tasks = list(map(CalibrationTask, ingredients.models, ingredients.curvature, images))
    workspace = folder / "hidden-states.tmp"
    reports = calibrate(
        tower.to(plan.recipe.device),
        tasks,
        plan.weights,
        plan.architecture,
        workspace,
        on_step=lambda done, total: progress("calibrating", done, total),
    )
    shutil.rmtree(workspace)
    for seen in images:
        seen.report_broken()
    parameters = parameters_of(tower.cpu(), plan.architecture)
    for name, layer in layers.items():
        value = parameters[name].detach()
        stored = stored_as(value, layer.tensor.dtype, name)
        norm = float((value - ingredients.base.tensor(name).to(value)).norm())
        report = replace(layer.report, merged_norm=norm, calibration=reports.get(name))
        yield MergedLayer(name, stored, report)


# --- one stage ------------------------------------------------------------------------------------------------------


@dataclass
class _Moments:
    """G and C of one layer and one task, sums over images and positions; x has a 1 at its end where there is a bias."""

    gram: Tensor
    cross: Tensor


def _moments(
    block: Block, tuned: Block, stage: Stage, run: Run, profiles: Mapping[str, Tensor], *, is_last: bool
) -> dict[str, _Moments]:
    """The sums of every layer of a stage over one task's images; the last stage takes them through the tuned block."""
    first = block.layers[stage.layers[0]]
    inputs = {first: "in"}
    outputs = {tuned.layers[name]: "out" for name in stage.layers}
    if stage.residual:
        inputs[block.layers[stage.residual]] = "in"
        outputs[tuned.layers[stage.residual]] = "in"
    moments: dict[str, _Moments] = {}
    for part, merged_states, tuned_states in run.batches():
        with caught(inputs) as here, stopped():
            run.run_block(block.module, merged_states)
        with caught(outputs) as there, stopped():
            run.run_block(tuned.module, tuned_states)
        states = here[first]
        with_one = torch.cat([states, states.new_ones(*states.shape[:-1], 1)], dim=-1)
        for name in stage.layers:
            x = states if block.layers[name].bias is None else with_one
            off = there[tuned.layers[name]] - block.layers[name](states)
            if stage.residual:
                stream = there[tuned.layers[stage.residual]]
                off += stream - here[block.layers[stage.residual]]
                if is_last:
                    run.tuned[part] = stream + there[tuned.layers[name]]
            heard = profiles[name].to(x.device)
            kept = heard > 0
            flat = x[:, kept].flatten(0, 1)
            weighted = (x[:, kept] * heard[kept, None]).flatten(0, 1)
            gram, cross = _precise(weighted.mT @ flat), _precise(off[:, kept].flatten(0, 1).mT @ weighted)
            if name in moments:
                moments[name].gram += gram
                moments[name].cross += cross
            else:
                moments[name] = _Moments(gram, cross)
    return moments


def _precise(sums: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none (Apple's)."""
    return (sums.cpu() if sums.device.type == "mps" else sums).double()


def _profile(task: CalibrationTask, layer: str) -> Tensor:
    """pi_ts, length positions, of mean 1; flat where the loss does not hear of the layer at all."""
    heard = task.curvature.tensor(f"{layer}.weight.positions").float()
    return heard / heard.mean() if bool(heard.any()) else torch.ones_like(heard)


def _solve(
    linear: Any,
    moments: Sequence[_Moments],
    curvature: Sequence[Tensor],
    weights: Sequence[float],
    rho: float,
    share: float,
    name: str,
) -> CalibrationReport:
    """One layer's step, added to it."""
    # solved in float32: rho keeps the system far from singular, and most GPUs are slow at float64
    grams = torch.stack([of_task.gram.float() for of_task in moments])
    crosses = torch.stack([of_task.cross.float() for of_task in moments])
    outputs = torch.stack(list(curvature)).to(grams)
    solution = anchored_step(grams, crosses, outputs, grams.new_tensor(weights), rho=rho, share=share)
    check_merged(solution.x, name, "calibration")
    step, width = solution.x.to(linear.weight), linear.weight.shape[1]
    size = float(step[:, :width].norm() / linear.weight.norm())
    linear.weight += step[:, :width]
    if linear.bias is not None:
        linear.bias += step[:, -1]
    return CalibrationReport(solution.steps, solution.residual, size)
