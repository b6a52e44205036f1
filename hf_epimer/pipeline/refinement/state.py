"""The state of a refinement between two steps, in one file, so that a killed run goes on to the same bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_epimer.checkpoints.atomic import atomic_file


@dataclass
class State:
    """How far a refinement has got.

    Attributes:
        step: steps done.
        distances: step -> d_t of every task on what is held out, where they were measured.
        best_step: the one whose weights are kept.
        best: canonical name -> these weights, on the CPU.
    """

    step: int
    distances: dict[int, list[float]]
    best_step: int
    best: Mapping[str, Tensor]


def write_state(
    file: Path, state: State, parameters: Mapping[str, nn.Parameter], optimizers: Sequence[Optimizer]
) -> None:
    """Write a state with the weights and moments of this step.

    Raises:
        OutputError: the disk is full.
    """
    moments = {
        f"optimizer.{which}.{number}.{name}": value
        for which, optimizer in enumerate(optimizers)
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    weights = {f"weights.{name}": parameter.detach() for name, parameter in parameters.items()}
    best = {} if state.best_step == state.step else {f"best.{name}": value for name, value in state.best.items()}
    words = {"step": state.step, "distances": list(state.distances.items()), "best_step": state.best_step}
    with atomic_file(file) as unfinished:
        save_file(
            {name: value.cpu().contiguous() for name, value in {**weights, **best, **moments}.items()},
            unfinished,
            {"state": json.dumps(words)},
        )


def read_state(file: Path, parameters: Mapping[str, nn.Parameter], optimizers: Sequence[Optimizer]) -> State:
    """Read a state, its weights and moments into `parameters` and `optimizers`."""
    with safe_open(file, framework="pt") as opened:
        words = json.loads(opened.metadata()["state"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    moments: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for stored, value in tensors.items():
        if stored.startswith("optimizer."):
            _, which, number, name = stored.split(".")
            moments[int(which)].setdefault(int(number), {})[name] = value
    for optimizer, of_it in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict({"state": of_it, "param_groups": optimizer.state_dict()["param_groups"]})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weights.{name}"])
    kept = "weights" if words["best_step"] == words["step"] else "best"
    best = {name: tensors[f"{kept}.{name}"].clone() for name in parameters}
    return State(words["step"], dict(words["distances"]), words["best_step"], best)
