"""A merge as a whole tower and back: for stages that look at all layers at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.merging.finite import stored_as
from hf_epimer.merging.report import LayerReport
from hf_epimer.merging.stream import MergedLayer
from hf_epimer.models.loading import load_tower
from hf_epimer.models.weights import parameters_of
from hf_epimer.pipeline.plan import Plan


@dataclass(frozen=True)
class Outline:
    """A merged layer without its values, which the tower holds: a large merge is in memory once."""

    name: str
    dtype: torch.dtype
    report: LayerReport


@torch.no_grad()
def tower_of(merged: Iterable[MergedLayer], plan: Plan) -> tuple[nn.Module, list[Outline]]:
    """The merged tower, in fp32 and evaluation mode, on the CPU, and what else is known of its layers.

    Args:
        merged: every parameter, each put into the tower as it comes.
    """
    tower = load_tower(plan.base.folder_with_tokenizer())
    parameters = parameters_of(tower, plan.architecture)
    outlines = []
    for layer in merged:
        parameters[layer.name].copy_(layer.tensor)
        outlines.append(Outline(layer.name, layer.tensor.dtype, layer.report))
    return tower, outlines


def with_weights_of(
    tower: nn.Module, outlines: Sequence[Outline], plan: Plan, base: TensorSource
) -> Iterator[MergedLayer]:
    """The layers with the tower's weights, in the type that they had.

    Raises:
        NumericalError: a value does not fit into it.
    """
    parameters = parameters_of(tower, plan.architecture)
    for layer in outlines:
        value = parameters[layer.name].detach().cpu()
        stored = stored_as(value, layer.dtype, layer.name)
        norm = float((value - base.tensor(layer.name).to(value)).norm())
        yield MergedLayer(layer.name, stored, replace(layer.report, merged_norm=norm))
