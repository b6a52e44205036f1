"""Calibration: a merge's linear layers solved again in forward order, on images of every task.

A merge is made layer by layer from weights, so every layer meets inputs that its neighbours have changed and nobody
told it about. Calibration goes through the merged tower from front to back. At each linear layer, x is what the merged
tower gives it on images of task t, y what task t's own tower makes of the same images there:

    minimise over E   sum_t l_t (nrm_t sum_i pi_i |y_i - (W + E) x_i|^2 + prior tr((W_t - W - E) N_t (W_t - W - E)^T))
                      + rho |E|^2

i runs over images, views and positions; pi_i is how much the loss of task t hears of a position; nrm_t divides by the
mean squared input; N_t = D_t^T D_t of mean diagonal 1 is what the task vector says of the inputs that a few hundred
images do not (`hf_epimer.numerics.regression`). A bias belongs to W (x has a 1 in it), but not to the prior. A layer
that writes to the residual stream is asked for what the stream itself is off by, too. Labels enter through pi alone.

Per block and view, in units of one layer w x w at every position: the tuned tower is passed once (12 of a CLIP block),
the merged one up to each layer that writes and once through (7 + 12), and sums take 12 (cross products) and 19 (Gram
matrices, of which fc2's is 16).

Related: RegMean (inputs of the tuned towers, no prior, all layers at once); RegMean++ and FeatCal (inputs of merged
layers).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.errors import DataError
from hf_epimer.merging.finite import check_merged
from hf_epimer.models.architecture import Architecture
from hf_epimer.models.transfer import sent
from hf_epimer.models.weights import Block, blocks_of, parameters_of, put_weights
from hf_epimer.numerics.regression import anchored_step, prior
from hf_epimer.pipeline.calibration.finished import block_file, keep_block, restore_block
from hf_epimer.pipeline.calibration.passage import CalibrationTask, Moments, Passage, pooled
from hf_epimer.pipeline.calibration.states import (
    TOWERS,
    HiddenStates,
    caught,
    states_in_files,
    states_in_memory,
    stopped,
)
from hf_epimer.pipeline.processes import ALONE, Processes
from hf_epimer.pipeline.views import crops
from hf_epimer.types import Precision

PRIOR = 1.0
"""The say of the task vectors against that of the images."""

OnStep = Callable[[int, int], None]
"""(steps done since the last call, steps in all)."""


@torch.no_grad()
def calibrate(
    tower: nn.Module,
    base: TensorSource,
    tasks: Sequence[CalibrationTask],
    architecture: Architecture,
    workspace: Path,
    *,
    in_memory: bool = False,
    views: int = 1,
    rho: float = 0.2,
    prior_weight: float = PRIOR,
    precision: Precision = "no",
    processes: Processes = ALONE,
    on_step: OnStep = lambda done, total: None,
) -> dict[str, float]:
    """Solve every linear layer of a merged tower again, in place.

    Several processes see a share of every task's images each, add up their sums, and solve the same equations.

    Args:
        tower: the merge, in evaluation mode, on the device where it is to be done.
        base: theta_0.
        tasks: one per merged checkpoint, their weights summing to 1.
        workspace: a folder for finished blocks and hidden states; what an interrupted run with the same arguments has
            left there is gone on with.
        in_memory: whether hidden states stay on the tower's device instead: images are then passed through finished
            blocks again.
        views: of every image, at least 1.
        rho, prior_weight: as above; rho > 0.
        precision: of the passes; what they sum up is in float32.
        processes: that call this together, each with a tower, images and a workspace of its own.
        on_step: progress; a step is one task in one residual of one block.

    Returns:
        Canonical name of every solved weight -> the step's norm relative to the weight's.

    Raises:
        DataError: a task has no images, or fewer than there are processes.
        NumericalError: a solution is not finite.
    """
    blocks = blocks_of(tower, architecture)
    kept = list(takewhile(Path.exists, (block_file(workspace, n) for n in range(len(blocks)))))
    done = [load_file(path) for path in kept[: min(processes.gather(len(kept)))]]
    steps = len(blocks[0].residuals(architecture)) * len(tasks)
    on_step(0, len(blocks) * steps)
    states = [
        _first_states(tower, blocks, task, views, architecture, None if in_memory else workspace / f"{n}", len(done))
        for n, task in enumerate(tasks)
    ]
    tuned = copy.deepcopy(blocks[0])  # takes the weights of any block of any task
    sizes: dict[str, float] = {}
    for number, block in enumerate(blocks):
        ways = [
            [Passage(block, tuned, residual, *entry, precision) for entry in zip(tasks, states, strict=True)]
            for residual in block.residuals(architecture)
        ]
        if number < len(done):
            sizes |= restore_block(block, done[number])
            if states[0].blocks == number:  # they are not in files, where they would be behind it
                for passage in chain.from_iterable(ways):
                    passage.repeat()
                for state in states:
                    state.end_block()
            on_step(steps, len(blocks) * steps)
            continue
        solved: dict[str, float] = {}
        for passages in ways:
            residual = passages[0].residual
            for layers in (residual.reads, (residual.writes,)):
                moments = pooled((passage.moments(layers) for passage in passages), tasks, processes)
                for layer in layers:
                    scale = residual.scale if layer == residual.writes else None
                    solved[f"{block.name}.{layer}.weight"] = _solve(
                        block, layer, scale, moments, tasks, base, rho, prior_weight
                    )
            for passage in passages:
                passage.advance()
                on_step(1, len(blocks) * steps)
        for state in states:
            state.end_block()
        keep_block(block, solved, block_file(workspace, number))
        processes.gather(None)  # none overwrites the block's beginning before all have its end
        sizes |= solved
    return sizes


def _first_states(
    tower: nn.Module,
    blocks: Sequence[Block],
    task: CalibrationTask,
    views: int,
    architecture: Architecture,
    folder: Path | None,
    done: int,
) -> HiddenStates:
    """One task's images through both towers up to their first block; in `folder` as an interrupted run has left them.

    Raises:
        DataError: there are none.
    """

    def batches() -> Iterator[dict[str, Tensor]]:
        first, device = blocks[0].module, next(tower.parameters()).device
        other = copy.deepcopy(tower, {id(block.module): block.module for block in blocks})  # none of them is run here
        in_blocks = {name for block in blocks for name in block.parameters}
        outside = {name: value for name, value in parameters_of(other, architecture).items() if name not in in_blocks}
        put_weights(outside, task.tuned)
        for batch in task.images:
            inputs = sent(batch.inputs, device)
            for view in range(views):
                pixels = crops(inputs, batch.indices, view)
                found = {}
                for name, module in zip(TOWERS, (tower, other)):
                    with caught(first) as seen, stopped():
                        architecture.features(module, pixels)
                    found[name] = seen[first]
                yield found

    states = states_in_files(folder, batches(), done) if folder else states_in_memory(batches())
    if states is None:
        raise DataError(f"{task.tuned.label}: there are no images to calibrate on")
    return states


def _solve(
    block: Block,
    layer: str,
    scale: str | None,
    moments: Moments,
    tasks: Sequence[CalibrationTask],
    base: TensorSource,
    rho: float,
    prior_weight: float,
) -> float:
    """One layer's step, added to it; its norm relative to the weight's.

    A layer whose outputs are scaled (LayerScale) is solved as the one layer diag(scale) W that both are.
    """
    name = f"{block.name}.{layer}.weight"
    linear: Any = block.layers[layer]
    parts = [linear.weight] if linear.bias is None else [linear.weight, linear.bias[:, None]]
    factor = linear.weight.new_ones(1, 1) if scale is None else block.parameters[f"{block.name}.{scale}"][:, None]
    weight, start = factor * linear.weight, _scaled(block, name, scale, base)
    before = (factor * torch.cat(parts, dim=1)).to(moments.gram)
    size, width = before.shape[1], linear.weight.shape[1]
    sums = moments.gram[:size, :size].clone()
    cross = moments.cross[layer][:, :size] - before @ sums
    for task in tasks:
        tuned = _scaled(block, name, scale, task.tuned)
        extra_gram, extra_cross = prior(tuned - start, tuned - weight)
        sums[:width, :width] += (prior_weight * task.weight * extra_gram).to(sums.device)
        cross[:, :width] += (prior_weight * task.weight * extra_cross).to(sums.device)
    step = anchored_step(sums, cross, rho)
    check_merged(step, name, "calibration")
    unscaled = (step / factor.to(step)).where(factor.to(step) != 0, 0.0).to(linear.weight)
    linear.weight += unscaled[:, :width]
    if linear.bias is not None:
        linear.bias += unscaled[:, -1]
    return float(step[:, :width].norm() / before[:, :width].norm())


def _scaled(block: Block, weight: str, scale: str | None, source: TensorSource) -> Tensor:
    """diag(scale) W of a checkpoint."""
    device = block.parameters[weight].device
    values = sent(source.tensor(weight), device).float()
    return values if scale is None else sent(source.tensor(f"{block.name}.{scale}"), device).float()[:, None] * values
