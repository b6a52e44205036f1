"""A merge as a whole tower and back: for stages that look at all layers at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from hf_epimer.checkpoints.reader import StateDict, TensorSource
from hf_epimer.merging.finite import stored_as
from hf_epimer.merging.stream import MergedLayer
from hf_epimer.models.loading import load_tower
from hf_epimer.models.weights import parameters_of, put_weights
from hf_epimer.pipeline.plan import Plan


def tower_of(layers: Sequence[MergedLayer], plan: Plan) -> nn.Module:
    """The merged tower, in fp32 and evaluation mode, on the CPU.

    Args:
        layers: every parameter.
    """
    tower = load_tower(plan.base.folder_with_tokenizer())
    merge = StateDict("merge", {layer.name: layer.tensor for layer in layers})
    put_weights(parameters_of(tower, plan.architecture), merge)
    return tower


def with_weights_of(
    tower: nn.Module, layers: Sequence[MergedLayer], plan: Plan, base: TensorSource
) -> Iterator[MergedLayer]:
    """The layers with the tower's weights, in the type that they had.

    Raises:
        NumericalError: a value does not fit into it.
    """
    parameters = parameters_of(tower, plan.architecture)
    for layer in layers:
        value = parameters[layer.name].detach().cpu()
        stored = stored_as(value, layer.tensor.dtype, layer.name)
        norm = float((value - base.tensor(layer.name).to(value)).norm())
        yield MergedLayer(layer.name, stored, replace(layer.report, merged_norm=norm))
