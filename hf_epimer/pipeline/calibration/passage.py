"""One task's images on their way through one residual of a block, and the sums that are taken of them there.

Sums of a batch are taken in float32 and added up in float64; passes may be in bfloat16, but for the residual stream.
Nothing in the loops over batches waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.models.architecture import Residual
from hf_epimer.models.transfer import sent
from hf_epimer.models.weights import Block
from hf_epimer.numerics.product import product
from hf_epimer.numerics.regression import gram
from hf_epimer.pipeline.calibration.states import HiddenStates, caught, stopped
from hf_epimer.pipeline.processes import Processes
from hf_epimer.tasks.images import Batch
from hf_epimer.types import Precision


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


@dataclass
class Moments:
    """Sums of one task over images and positions, in float64, x with a 1 at its end: sum pi x x^T, sum pi y x^T."""

    gram: Tensor
    cross: dict[str, Tensor]


@dataclass(frozen=True)
class Passage:
    """One task's images on their way through one residual of a block.

    Attributes:
        tuned: a block for the task's own weights.
        precision: of the passes.
    """

    block: Block
    tuned: Block
    residual: Residual
    task: CalibrationTask
    states: HiddenStates
    precision: Precision = "no"

    def moments(self, layers: tuple[str, ...]) -> Moments:
        """Of the layers that read, while the tuned tower's states are taken through; or of the one that writes."""
        reading = layers == self.residual.reads
        if reading:
            self._load_tuned()
        heard = torch.stack([_heard(self.task, f"{self.block.name}.{layer}.weight") for layer in layers]).mean(0)
        read = heard.nonzero().squeeze(1)  # positions that nobody reads are left out
        profile, positions = sent(heard[read], self._device), sent(read, self._device)
        sums: Moments | None = None
        for part in self.states.batches():
            x = self._input(layers[0], part)
            targets = self._tuned_outputs(part) if reading else {layers[0]: self._missing(part)}
            heard_targets = {layer: y.index_select(1, positions) for layer, y in targets.items()}
            sums = _added(sums, x.index_select(1, positions), heard_targets, profile)
        if reading:
            self.states.passed("tuned")
        assert sums is not None
        return sums

    def advance(self) -> None:
        """Take the merged tower's states through the residual with its new weights."""
        for part in self.states.batches():
            self.states.write("merged", part, self._run(self.block, self._read("merged", part)))
        self.states.passed("merged")

    def repeat(self) -> None:
        """Take both towers' states through a residual that an interrupted run has solved."""
        self._load_tuned()
        for part in self.states.batches():
            self._tuned_outputs(part)
        self.states.passed("tuned")
        self.advance()

    def _load_tuned(self) -> None:
        for name, parameter in self.tuned.parameters.items():
            own = f"{self.block.name}.{name.removeprefix(self.tuned.name + '.')}"
            parameter.copy_(sent(self.task.tuned.tensor(own), parameter.device))

    @property
    def _device(self) -> torch.device:
        return next(iter(self.block.parameters.values())).device

    def _read(self, tower: str, part: slice) -> Tensor:
        return sent(self.states.read(tower, part), self._device)

    def _input(self, layer: str, part: slice) -> Tensor:
        """What a layer reads in the merged tower, with a 1 at its end."""
        linear = self.block.layers[layer]
        with caught(linear) as seen, stopped():
            self._run(self.block, self._read("merged", part))
        x = seen[linear].float()
        return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)

    def _tuned_outputs(self, part: slice) -> dict[str, Tensor]:
        """What the reading layers put out in the tuned tower, whose states move on."""
        linears = {layer: self.tuned.layers[layer] for layer in self.residual.reads}
        with caught(outputs=linears.values()) as seen:
            self.states.write("tuned", part, self._run(self.tuned, self._read("tuned", part)))
        return {layer: seen[linear].float() for layer, linear in linears.items()}

    def _run(self, block: Block, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.residual.run(block.module, states)

    def _missing(self, part: slice) -> Tensor:
        """What the merged tower's residual stream lacks after this residual."""
        return self._read("tuned", part) - self._read("merged", part)


def pooled(moments: Iterable[Moments], tasks: Sequence[CalibrationTask], processes: Processes) -> Moments:
    """sum_t l_t nrm_t of all tasks' sums, each over the images of all processes; a task without inputs adds nothing."""
    total: Moments | None = None
    for task, sums in zip(tasks, moments, strict=True):
        sums_of_all = processes.sum(sums.gram)
        mean = sums_of_all.diagonal().mean()
        gain = torch.where(mean > 0, task.weight / mean, 0.0)
        scaled = Moments(
            gain * sums_of_all, {layer: gain * processes.sum(cross) for layer, cross in sums.cross.items()}
        )
        total = scaled if total is None else _sum(total, scaled)
    assert total is not None
    return total


def _heard(task: CalibrationTask, weight: str) -> Tensor:
    """pi, length positions, of mean 1; flat where the loss does not hear of the layer at all."""
    heard = task.curvature.tensor(f"{weight}.positions").float()
    return heard / heard.mean() if bool(heard.any()) else torch.ones_like(heard)


def _added(sums: Moments | None, x: Tensor, targets: Mapping[str, Tensor], heard: Tensor) -> Moments:
    """Sums with those of one batch."""
    inputs, weighted = x.flatten(0, 1), (x * heard[:, None]).flatten(0, 1)
    new = Moments(
        _precise(gram(inputs, weighted)),
        {layer: _precise(product(y.flatten(0, 1).mT, weighted)) for layer, y in targets.items()},
    )
    return new if sums is None else _sum(sums, new)


def _sum(total: Moments, more: Moments) -> Moments:
    """The first with the second added to it, in place."""
    total.gram += more.gram
    for layer, cross in more.cross.items():
        total.cross[layer] += cross
    return total


def _precise(sums: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none (Apple's)."""
    return (sums.cpu() if sums.device.type == "mps" else sums).double()
