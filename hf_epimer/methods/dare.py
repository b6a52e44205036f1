"""DARE: drop entries of every task vector at random and rescale the rest. Yu et al., ICML 2024.

    D_t <- mask_t o D_t / (1 - q),  mask_t ~ Bernoulli(1 - q);  then the mean, or TIES' election on what is left

The mask is keyed by (seed, layer name, task label): it does not depend on the order of tasks or of layers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_epimer.errors import UsageError
from hf_epimer.methods.base import Layer, LayerMerge, Method, MethodConfig, Paper, weighted_sum
from hf_epimer.methods.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DAREConfig(MethodConfig):
    """Options of `dare`."""

    drop: float = option(0.9, "probability q of dropping an entry", low=0.0)
    alpha: float = option(1.0, "global scale of the merged task vector")
    combine: Literal["mean", "ties"] = option("mean", "how the thinned task vectors are combined")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop >= 1:
            raise UsageError(f"--drop must be below 1, not {self.drop}: nothing would be left to rescale")


def merge_dare(layer: Layer, config: DAREConfig, survey: None = None) -> LayerMerge:
    """Drop, rescale, combine."""
    import torch

    from hf_epimer.numerics.trimming import elect_and_average

    thinned = torch.stack(
        [
            torch.where(_mask(layer, label, config.drop), d, 0) / (1 - config.drop)
            for label, d in zip(layer.labels, layer.task_vectors, strict=True)
        ]
    )
    if config.combine == "mean":
        return LayerMerge(weighted_sum(layer.weights, thinned) * config.alpha)
    return LayerMerge(elect_and_average(thinned, layer.weights, "mass") * config.alpha)


def _mask(layer: Layer, label: str, drop: float) -> Tensor:
    """True where an entry is kept; drawn on the CPU so that every device sees the same mask."""
    import torch

    key = hashlib.sha256(f"{layer.seed}\0{layer.name}\0{label}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    return (torch.rand(layer.base.shape, generator=generator) >= drop).to(layer.base.device)


DARE = Method(
    "dare",
    "drop entries at random, rescale the rest, then average or elect",
    "W = W_0 + alpha sum_t l_t mask_t o D_t / (1 - q)",
    Paper(
        "yu2024language",
        "Yu, Le and others",
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        "ICML",
        2024,
        "https://arxiv.org/abs/2311.03099",
    ),
    DAREConfig,
    merge_dare,
    title="DARE",
    core="both",
)
