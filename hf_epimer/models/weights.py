"""The one way from a checkpoint's tensors, by their canonical names, into a module, whatever the module calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import nn

from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.models.architecture import Architecture, Residual


@dataclass(frozen=True)
class Block:
    """A residual block of a tower.

    Attributes:
        name: canonical.
        module: of the tower.
        layers: canonical name within the block -> layer.
        parameters: canonical name -> parameter.
    """

    name: str
    module: nn.Module
    layers: Mapping[str, nn.Module]
    parameters: Mapping[str, nn.Parameter]

    def residuals(self, architecture: Architecture) -> list[Residual]:
        """Those of the architecture's whose layers it has: some families have blocks of several kinds."""
        return [residual for residual in architecture.residuals if self.layers.keys() >= {*residual.layers}]


def parameter_names(tower: nn.Module, architecture: Architecture) -> dict[str, str]:
    """Name of each of the architecture's parameters in a module -> its canonical name."""
    named = {name: architecture.canonical(name) for name, _ in tower.named_parameters()}
    return {name: canonical for name, canonical in named.items() if canonical is not None}


def parameters_of(tower: nn.Module, architecture: Architecture) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter."""
    return {canonical: tower.get_parameter(name) for name, canonical in parameter_names(tower, architecture).items()}


@torch.no_grad()
def put_weights(parameters: Mapping[str, nn.Parameter], source: TensorSource) -> None:
    """Overwrite parameters, all of a tower's or some, with the tensors of the same canonical names."""
    for name, parameter in parameters.items():
        parameter.copy_(source.tensor(name))


def blocks_of(tower: nn.Module, architecture: Architecture) -> list[Block]:
    """The residual blocks of a tower, in the order in which data runs through them."""
    inside = f"{architecture.prefix}{architecture.blocks}."
    names: dict[int, dict[str, str]] = {}  # number of the block -> canonical name -> name in the module
    for name, canonical in parameter_names(tower, architecture).items():
        if canonical.startswith(inside):
            number = int(canonical.removeprefix(inside).split(".")[0])
            names.setdefault(number, {})[canonical] = name
    return [_block(tower, f"{inside}{number}", names[number]) for number in sorted(names)]


def _block(tower: nn.Module, block: str, names: Mapping[str, str]) -> Block:
    paths = {canonical.rpartition(".")[0]: name.rpartition(".")[0] for canonical, name in names.items()}
    levels = takewhile(lambda level: len(set(level)) == 1, zip(*(path.split(".") for path in paths.values())))
    return Block(
        block,
        tower.get_submodule(".".join(level[0] for level in levels)),
        {layer.removeprefix(f"{block}."): tower.get_submodule(path) for layer, path in paths.items()},
        {canonical: tower.get_parameter(name) for canonical, name in names.items()},
    )
