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
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_epimer.checkpoints.atomic import write_text
from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.errors import DataError
from hf_epimer.merging.finite import check_merged
from hf_epimer.models.architecture import Architecture, Residual
from hf_epimer.models.weights import Block, blocks_of, parameters_of, put_weights
from hf_epimer.numerics.product import product
from hf_epimer.numerics.regression import anchored_step, gram, prior
from hf_epimer.pipeline.calibration.finished import block_file, keep_block, restore_block
from hf_epimer.pipeline.calibration.states import TOWERS, HiddenStates, caught, stopped, write_first
from hf_epimer.pipeline.processes import ALONE, Processes
from hf_epimer.pipeline.views import crops
from hf_epimer.tasks.images import Batch

PRIOR = 1.0
"""The say of the task vectors against that of the images."""

OnStep = Callable[[int, int], None]
"""(steps done since the last call, steps in all)."""


@dataclass(frozen=True)
class CalibrationTask:
    """What calibration reads of one task.

    Attributes:
        tuned: theta_t.
        weight: l_t.
        curvature: how much its loss hears of every position of a layer, as `<weight's name>.positions`.
        images: in batches, read once.
    """

    tuned: TensorSource
    weight: float
    curvature: TensorSource
    images: Iterable[Batch]


@torch.no_grad()
def calibrate(
    tower: nn.Module,
    base: TensorSource,
    tasks: Sequence[CalibrationTask],
    architecture: Architecture,
    workspace: Path,
    *,
    views: int = 1,
    rho: float = 0.2,
    prior_weight: float = PRIOR,
    processes: Processes = ALONE,
    on_step: OnStep = lambda done, total: None,
) -> dict[str, float]:
    """Solve every linear layer of a merged tower again, in place.

    Several processes see a share of every task's images each, add up their sums, and solve the same equations.

    Args:
        tower: the merge, in evaluation mode, on the device where it is to be done.
        base: theta_0.
        tasks: one per merged checkpoint, their weights summing to 1.
        workspace: a folder for hidden states and finished blocks; what an interrupted run with the same arguments has
            left there is gone on with.
        views: of every image, at least 1.
        rho, prior_weight: as above; rho > 0.
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
        _first_states(tower, blocks, task, views, architecture, workspace / str(number), len(done))
        for number, task in enumerate(tasks)
    ]
    tuned = copy.deepcopy(blocks[0])  # takes the weights of any block of any task
    sizes: dict[str, float] = {}
    for number, block in enumerate(blocks):
        if number < len(done):
            sizes |= restore_block(block, done[number])
            on_step(steps, len(blocks) * steps)
            continue
        solved: dict[str, float] = {}
        for residual in block.residuals(architecture):
            passages = [_Passage(block, tuned, residual, *entry) for entry in zip(tasks, states, strict=True)]
            for layers in (residual.reads, (residual.writes,)):
                moments = _pooled((_of_all(processes, passage.moments(layers)) for passage in passages), tasks)
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
    folder: Path,
    done: int,
) -> HiddenStates:
    """One task's images through both towers up to their first block, or as an interrupted run has left them.

    Raises:
        DataError: there are none.
    """
    note = folder / "shape.json"
    if note.exists():
        return HiddenStates(folder, json.loads(note.read_text(encoding="utf-8")), done)
    first = blocks[0].module
    in_blocks = {name for block in blocks for name in block.parameters}
    other = copy.deepcopy(tower, {id(block.module): block.module for block in blocks})  # none of them is run here
    put_weights(
        {name: value for name, value in parameters_of(other, architecture).items() if name not in in_blocks}, task.tuned
    )
    device = next(tower.parameters()).device

    def batches() -> Iterator[dict[str, Tensor]]:
        for batch in task.images:
            for view in range(views):
                pixels = crops(batch.inputs, batch.indices, view).to(device)
                found = {}
                for name, module in zip(TOWERS, (tower, other)):
                    with caught(first) as seen, stopped():
                        architecture.features(module, pixels)
                    found[name] = seen[first]
                yield found

    shape = write_first(folder, batches())
    if shape is None:
        raise DataError(f"{task.tuned.label}: there are no images to calibrate on")
    write_text(note, json.dumps(shape))
    return HiddenStates(folder, shape)


# --- one residual ---------------------------------------------------------------------------------------------------


@dataclass
class _Moments:
    """Sums of one task over images and positions, in float64, x with a 1 at its end: sum pi x x^T, sum pi y x^T."""

    gram: Tensor
    cross: dict[str, Tensor]


@dataclass(frozen=True)
class _Passage:
    """One task's images on their way through one residual of a block.

    Attributes:
        tuned: a block for the task's own weights.
    """

    block: Block
    tuned: Block
    residual: Residual
    task: CalibrationTask
    states: HiddenStates

    def moments(self, layers: tuple[str, ...]) -> _Moments:
        """Of the layers that read, while the tuned tower's states are taken through; or of the one that writes."""
        reading = layers == self.residual.reads
        if reading:
            self._load_tuned()
        heard = torch.stack([_heard(self.task, f"{self.block.name}.{layer}.weight") for layer in layers]).mean(0)
        sums: _Moments | None = None
        for part in self.states.batches():
            x = self._input(layers[0], part)
            targets = self._tuned_outputs(part) if reading else {layers[0]: self._missing(part)}
            sums = _added(sums, x, targets, heard.to(x))
        if reading:
            self.states.passed("tuned")
        assert sums is not None
        return sums

    def advance(self) -> None:
        """Take the merged tower's states through the residual with its new weights."""
        for part in self.states.batches():
            self.states.write("merged", part, self.residual.run(self.block.module, self._read("merged", part)))
        self.states.passed("merged")

    def _load_tuned(self) -> None:
        for name, parameter in self.tuned.parameters.items():
            own = f"{self.block.name}.{name.removeprefix(self.tuned.name + '.')}"
            parameter.copy_(self.task.tuned.tensor(own))

    def _read(self, tower: str, part: slice) -> Tensor:
        return self.states.read(tower, part).to(next(iter(self.block.parameters.values())).device)

    def _input(self, layer: str, part: slice) -> Tensor:
        """What a layer reads in the merged tower, with a 1 at its end."""
        linear = self.block.layers[layer]
        with caught(linear) as seen, stopped():
            self.residual.run(self.block.module, self._read("merged", part))
        return torch.cat([seen[linear], seen[linear].new_ones(*seen[linear].shape[:-1], 1)], dim=-1)

    def _tuned_outputs(self, part: slice) -> dict[str, Tensor]:
        """What the reading layers put out in the tuned tower, whose states move on."""
        linears = {layer: self.tuned.layers[layer] for layer in self.residual.reads}
        with caught(outputs=linears.values()) as seen:
            self.states.write("tuned", part, self.residual.run(self.tuned.module, self._read("tuned", part)))
        return {layer: seen[linear] for layer, linear in linears.items()}

    def _missing(self, part: slice) -> Tensor:
        """What the merged tower's residual stream lacks after this residual."""
        return self._read("tuned", part) - self._read("merged", part)


def _heard(task: CalibrationTask, weight: str) -> Tensor:
    """pi, length positions, of mean 1; flat where the loss does not hear of the layer at all."""
    heard = task.curvature.tensor(f"{weight}.positions").float()
    return heard / heard.mean() if bool(heard.any()) else torch.ones_like(heard)


def _added(sums: _Moments | None, x: Tensor, targets: Mapping[str, Tensor], heard: Tensor) -> _Moments:
    """Sums with those of one batch; positions that nobody reads are left out."""
    kept = heard > 0
    inputs, weighted = x[:, kept].flatten(0, 1), (x[:, kept] * heard[kept, None]).flatten(0, 1)
    new = _Moments(
        _precise(gram(inputs, weighted)),
        {layer: _precise(product(y[:, kept].flatten(0, 1).mT, weighted)) for layer, y in targets.items()},
    )
    if sums is None:
        return new
    sums.gram += new.gram
    for layer, cross in new.cross.items():
        sums.cross[layer] += cross
    return sums


def _precise(sums: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none (Apple's)."""
    return (sums.cpu() if sums.device.type == "mps" else sums).double()


def _of_all(processes: Processes, moments: _Moments) -> _Moments:
    """One task's sums over the images of all processes."""
    return _Moments(
        processes.sum(moments.gram), {layer: processes.sum(cross) for layer, cross in moments.cross.items()}
    )


def _pooled(moments: Iterable[_Moments], tasks: Sequence[CalibrationTask]) -> _Moments:
    """sum_t l_t nrm_t of all tasks' sums; a task without inputs adds nothing."""
    pooled: _Moments | None = None
    for task, sums in zip(tasks, moments, strict=True):
        mean = float(sums.gram.diagonal().mean())
        gain = task.weight / mean if mean > 0 else 0.0
        scaled = _Moments(gain * sums.gram, {layer: gain * cross for layer, cross in sums.cross.items()})
        if pooled is None:
            pooled = scaled
        else:
            pooled.gram += scaled.gram
            for layer, cross in scaled.cross.items():
                pooled.cross[layer] += cross
    assert pooled is not None
    return pooled


def _solve(
    block: Block,
    layer: str,
    scale: str | None,
    moments: _Moments,
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
    before = (factor * torch.cat(parts, dim=1)).to(moments.gram)
    size, width = before.shape[1], linear.weight.shape[1]
    sums = moments.gram[:size, :size].clone()
    cross = moments.cross[layer][:, :size] - before @ sums
    for task in tasks:
        tuned, start = (_scaled(block, name, scale, source).to(linear.weight) for source in (task.tuned, base))
        extra_gram, extra_cross = prior(tuned - start, tuned - factor * linear.weight)
        sums[:width, :width] += prior_weight * task.weight * extra_gram
        cross[:, :width] += prior_weight * task.weight * extra_cross
    step = anchored_step(sums, cross, rho)
    check_merged(step, name, "calibration")
    unscaled = (step / factor).where(factor != 0, 0.0)
    linear.weight += unscaled[:, :width].to(linear.weight)
    if linear.bias is not None:
        linear.bias += unscaled[:, -1].to(linear.bias)
    return float(step[:, :width].norm() / before[:, :width].norm())


def _scaled(block: Block, weight: str, scale: str | None, source: TensorSource) -> Tensor:
    """diag(scale) W of a checkpoint."""
    values = source.tensor(weight).float()
    return values if scale is None else source.tensor(f"{block.name}.{scale}").float()[:, None] * values
