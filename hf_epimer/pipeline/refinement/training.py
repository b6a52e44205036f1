"""The training loop of a refinement (of what, `objective` says): a warm-up and a cosine to zero.

Matrices of the blocks take steps of Muon (`hf_epimer.pipeline.refinement.muon`), everything else of AdamW.

Every step takes as many pictures of every task, one task's after the other, so that the memory is that of one task's.
Now and then L is measured on the pictures that are held out; the weights of its smallest value are the result, and all
that is needed to go on from there is written.

In several processes each takes its share of every task's pictures, and gradients are added up: the result is that of
one process but for rounding.

Memory: weights, gradients, the momentum and the best weights; activations of `PICTURES` pictures.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import get_cosine_schedule_with_warmup

from hf_epimer.checkpoints.reader import StateDict, TensorSource
from hf_epimer.errors import NumericalError
from hf_epimer.models.architecture import Architecture
from hf_epimer.models.classifier import Head
from hf_epimer.models.weights import parameters_of, put_weights
from hf_epimer.numerics.lowrank import LowRank
from hf_epimer.numerics.product import has_bfloat16
from hf_epimer.pipeline.processes import ALONE, Processes
from hf_epimer.pipeline.refinement.muon import FactoredMuon, Muon
from hf_epimer.pipeline.refinement.objective import loss, squared_distances
from hf_epimer.pipeline.refinement.pictures import Pictures, read_pictures, write_pictures
from hf_epimer.pipeline.refinement.state import State, read_state, write_state
from hf_epimer.pipeline.report import RefinementReport
from hf_epimer.tasks.images import Batch

logger = logging.getLogger(__name__)

PICTURES = 16
"""Of every task in a step."""

RATE = 0.006
"""Of the distance between the merge and its models: the root mean square of a step, where it is largest."""

WARM_UP = 0.1
"""The share of steps in which the learning rate rises."""

VIEWS = 4
"""Of every picture, at most: the whole and crops."""

MEASURED = 10
"""Times that what is held out is looked at, after the start."""


@dataclass(frozen=True)
class RefinementTask:
    """What a refinement reads of one task.

    Attributes:
        label: of the model.
        tuned: theta_t.
        weight: l_t; those of all tasks sum to 1.
        images: to be trained on, in batches, read once.
        held_out: to be judged by, of those that nothing before was fitted to either; read once.
        head: of the task.
    """

    label: str
    tuned: TensorSource
    weight: float
    images: Iterable[Batch]
    held_out: Iterable[Batch]
    head: Head


def refine(
    tower: nn.Module,
    tasks: Sequence[RefinementTask],
    architecture: Architecture,
    workspace: Path,
    *,
    steps: int,
    updates: Mapping[str, LowRank | Tensor] | None = None,
    seed: int = 0,
    processes: Processes = ALONE,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> RefinementReport:
    """Train a merged tower in place.

    Args:
        tower: the merge, in evaluation mode, on the device where it is to be trained.
        tasks: one per merged checkpoint.
        workspace: a folder for pictures and the state; what an interrupted run with the same arguments has left there
            is gone on with.
        steps: at least 1.
        updates: of a merged adapter, by canonical name: what is trained, low-rank updates within their rank; None for
            all parameters.
        seed: of the order of the pictures.
        processes: that share the work, this one among them.
        on_step: progress: (steps done since the last call, steps in all).

    Raises:
        DataError: a task has too few images.
        NumericalError: the loss is not finite.
        OutputError: the disk is full.
    """
    started = time.monotonic()
    parameters = parameters_of(tower, architecture)
    pictures = _embedded_by_their_own(tower, parameters, tasks, architecture, workspace, processes)
    loop = _Loop(tower, architecture, tasks, pictures, processes)
    trained = parameters if updates is None else {name: parameters[name] for name in updates}
    tower.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizers = _optimizers(trained, tasks, architecture, updates or {})
    file = workspace / "state.safetensors"
    if file.exists():
        state = read_state(file, trained, optimizers)
    else:
        state = State(0, {0: loop.distances()}, 0, _copied(trained))
    # step s is taken at the rate of s + 1 on its way to steps + 1: neither the first nor the last at a rate of 0
    warm_up = math.ceil(WARM_UP * steps)
    schedules = [
        get_cosine_schedule_with_warmup(each, warm_up, steps + 1, last_epoch=state.step) for each in optimizers
    ]
    on_step(state.step, steps)
    while state.step < steps:
        tower.zero_grad()
        loop.backward(state.step, seed)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        state.step += 1
        if state.step % max(1, steps // MEASURED) == 0 or state.step == steps:
            state.distances[state.step] = loop.distances()
            _keep_best(state, [task.weight for task in tasks], trained)
            if processes.is_main:
                write_state(file, state, trained, optimizers)
        on_step(1, steps)
    put_weights(trained, StateDict("best", state.best))
    labels = [task.label for task in tasks]
    return RefinementReport(
        steps=steps,
        best_step=state.best_step,
        images={label: len(seen.pixels) for label, seen in zip(labels, pictures, strict=True)},
        before=dict(zip(labels, state.distances[0], strict=True)),
        after=dict(zip(labels, state.distances[state.best_step], strict=True)),
        seconds=time.monotonic() - started,
    )


def _optimizers(
    parameters: Mapping[str, nn.Parameter],
    tasks: Sequence[RefinementTask],
    architecture: Architecture,
    updates: Mapping[str, LowRank | Tensor],
) -> list[Optimizer]:
    """Of the blocks' matrices, of low-rank updates, and of everything else.

    Every parameter's rate is `RATE` (sum_t l_t mean (W_t - W)^2)^(1/2), which is right for models however far they are
    from their base, and for every kind of parameter.
    """
    matrices: list[dict[str, Any]] = []
    factored: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for name, parameter in parameters.items():
        apart = (
            task.weight * (task.tuned.tensor(name).to(parameter) - parameter.detach()).square().mean() for task in tasks
        )
        rate = RATE * math.sqrt(math.fsum(map(float, apart)))
        group = {"params": [parameter], "lr": rate, "initial_lr": rate}
        update = updates.get(name)
        if isinstance(update, LowRank):
            factored.append(group | {"update": update})
        elif parameter.ndim == 2 and architecture.blocks in name:
            matrices.append(group)
        else:
            others.append(group)
    device = next(iter(parameters.values())).device
    half = torch.bfloat16 if has_bfloat16(device) else torch.float32
    made = ((Muon, matrices, half), (FactoredMuon, factored, half))
    optimizers: list[Optimizer] = [kind(groups, dtype) for kind, groups, dtype in made if groups]
    return [*optimizers, AdamW(others, weight_decay=0.0)] if others else optimizers


@dataclass(frozen=True)
class _Loop:
    """What does not change from step to step."""

    tower: nn.Module
    architecture: Architecture
    tasks: Sequence[RefinementTask]
    pictures: Sequence[Pictures]
    processes: Processes

    @property
    def share(self) -> tuple[int, int]:
        """(number of this process, number of processes)."""
        return self.processes.rank, self.processes.count

    def backward(self, step: int, seed: int) -> None:
        """Give the parameters the gradient of a step, that of all processes."""
        device = next(self.tower.parameters()).device
        for task, seen in zip(self.tasks, self.pictures, strict=True):
            pixels, targets = seen.batch(step, PICTURES, seed, self.share)
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
                distances = self._distances(task, pixels, targets)
            (task.weight / PICTURES * distances.sum()).backward()
        for parameter in self.tower.parameters():
            if parameter.grad is not None:  # as of what features do not depend on
                parameter.grad = self.processes.sum(parameter.grad)

    @torch.no_grad()
    def distances(self) -> list[float]:
        """d_t of every task on what is held out."""
        sums = []
        for task, seen in zip(self.tasks, self.pictures, strict=True):
            parts = list(seen.held_out(self.share))
            together = math.fsum(float(self._distances(task, *part).sum()) for part in parts)
            sums.append([together, sum(len(pixels) for pixels, _ in parts)])
        device = next(self.tower.parameters()).device
        total, count = self.processes.sum(torch.tensor(sums, device=device)).unbind(1)
        found: list[float] = (total / count).tolist()
        return found

    def _distances(self, task: RefinementTask, pixels: Tensor, targets: Tensor) -> Tensor:
        embedded = _embedded(self.tower, self.architecture, task, pixels)
        return squared_distances(embedded, targets.to(embedded.device))


def _keep_best(state: State, weights: Sequence[float], parameters: Mapping[str, nn.Parameter]) -> None:
    """Keep the weights of this step where L is smaller than it has been.

    Raises:
        NumericalError: it is not finite.
    """
    losses = {step: loss(weights, distances) for step, distances in state.distances.items()}
    if not math.isfinite(losses[state.step]):
        raise NumericalError(f"refinement: the loss is not finite after {state.step} steps")
    logger.info("refinement: %.4g after %d steps, %.4g at the start", losses[state.step], state.step, losses[0])
    if losses[state.step] < losses[state.best_step]:
        state.best_step, state.best = state.step, _copied(parameters)


def _embedded(tower: nn.Module, architecture: Architecture, task: RefinementTask, pixels: Tensor) -> Tensor:
    """z_t(f(x)), [n, d], of pixels [n, 3, h, w]."""
    features = architecture.features_for(by_classifier=task.head.is_trained)
    return task.head.embed(features(tower, pixels.to(next(tower.parameters()).device)).float())


@torch.no_grad()
def _embedded_by_their_own(
    tower: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    tasks: Sequence[RefinementTask],
    architecture: Architecture,
    workspace: Path,
    processes: Processes,
) -> list[Pictures]:
    """Every task's pictures, embedded with its own weights in the tower, whose weights come back then."""
    start = _copied(parameters)
    found = []
    for number, task in enumerate(tasks):
        file = workspace / f"pictures-{number}.safetensors"
        with processes.main_first():  # one writes, the others find it in place
            if not file.exists():
                put_weights(parameters, task.tuned)
                own = partial(_embedded, tower, architecture, task)
                write_pictures(file, task.label, task.images, task.held_out, own, VIEWS)
        found.append(read_pictures(file, next(tower.parameters()).device))
    put_weights(parameters, StateDict("start", start))
    return found


def _copied(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
