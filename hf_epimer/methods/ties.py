"""TIES-Merging: trim, elect signs, average what agrees. Yadav et al., NeurIPS 2023.

    trim    keep the `density` largest |D_t| of task t, over the whole model (or per layer); the rest is 0
    elect   sign per entry: of sum l_t D_t (`mass`) or of sum l_t sign(D_t) (`count`)
    merge   average of the kept entries that carry the elected sign, times alpha

The model-wide threshold is exact: non-negative floats are ordered like their bit patterns, so counting patterns in two
passes (the high 16 bits of all entries, then the low 16 bits of the one bin in question) selects it without sorting.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from hf_epimer.errors import UsageError
from hf_epimer.methods.base import Layer, LayerMerge, Method, MethodConfig, OverLayers, Paper, option

Election = Literal["mass", "count"]


@dataclass(frozen=True)
class TIESConfig(MethodConfig):
    """Options of `ties`."""

    density: float = option(0.2, "share of entries kept per task", low=0.0, high=1.0)
    alpha: float = option(1.0, "global scale of the merged task vector")
    election: Literal["mass", "count"] = option("mass", "sign by summed values (TIES) or by votes (EpiMer's baseline)")
    trim: Literal["model", "layer"] = option("model", "keep the largest entries of the whole model or of each layer")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density == 0:
            raise UsageError("--density must be above 0: nothing would be kept")


def survey_thresholds(config: TIESConfig, over_layers: OverLayers) -> Tensor | None:
    """The smallest kept |D_t| over the whole model, length T; None when trimming per layer."""
    if config.trim == "layer":
        return None
    high = _total(over_layers(lambda layer: torch.stack([_count(_bits(d) >> 16, 0) for d in layer.task_vectors])))
    kept = max(1, round(config.density * int(high[0].sum())))
    bins, above = _locate(high, kept)
    first = [int(number) << 16 for number in bins]

    def low_patterns(layer: Layer) -> Tensor:
        return torch.stack([_count(_bits(d), start) for d, start in zip(layer.task_vectors, first, strict=True)])

    lowest, _ = _locate(_total(over_layers(low_patterns)), kept - above)
    return ((bins << 16) | lowest).to(torch.int32).view(torch.float32)


def _bits(d: Tensor) -> Tensor:
    return d.float().abs().flatten().view(torch.int32)


def _count(values: Tensor, first: int) -> Tensor:
    """How often each of the 2^16 integers from `first` on occurs."""
    shifted = (values - first).clamp_(-1, 1 << 16).add_(1)  # everything else falls into the two outer bins
    return torch.bincount(shifted, minlength=(1 << 16) + 2)[1:-1].cpu()


def _total(counts: Iterable[Tensor]) -> Tensor:
    return sum(counts, start=torch.zeros((), dtype=torch.int64))


def _locate(counts: Tensor, kept: Tensor | int) -> tuple[Tensor, Tensor]:
    """Per task: the bin that holds the kept-th largest value, and how many values lie in higher bins."""
    from_top = counts.flip(1).cumsum(1)
    position = (from_top < torch.as_tensor(kept).view(-1, 1)).sum(1)
    above = torch.where(position > 0, from_top.gather(1, (position - 1).clamp_min(0).unsqueeze(1)).squeeze(1), 0)
    return counts.shape[1] - 1 - position, above


def merge_ties(layer: Layer, config: TIESConfig, survey: Tensor | None) -> LayerMerge:
    """Trim, elect and average one layer."""
    if survey is None:
        kept = max(1, round(config.density * layer.base.numel()))
        magnitudes = layer.task_vectors.abs().reshape(layer.tasks, -1)
        thresholds = magnitudes.kthvalue(magnitudes.shape[1] - kept + 1, dim=1).values
    else:
        thresholds = survey
    # hardshrink keeps what is strictly larger: the largest float below the threshold keeps the threshold itself
    below = torch.nextafter(thresholds.float().cpu(), torch.tensor(0.0)).tolist()
    trimmed = (hardshrink(d, limit) for d, limit in zip(layer.task_vectors, below, strict=True))
    return LayerMerge(elect_and_average(trimmed, layer.weights, config.election) * config.alpha)


def elect_and_average(task_vectors: Iterable[Tensor], weights: Tensor, election: Election) -> Tensor:
    """TIES' elect and merge steps: weighted average of the non-zero entries that carry the elected sign.

    With a = sum l_t d_t, b = sum l_t |d_t|, and the same sums c, e over signs, the entries with sign s sum to
    (a + s b) / 2 and weigh (e + s c) / 2: one task at a time, and no masks.

    Args:
        task_vectors: trimmed, T tensors of one shape.
        weights: l_t, length T.
        election: `mass` or `count`.
    """
    sums: list[Tensor] = []
    for weight, d in zip(weights.tolist(), task_vectors, strict=True):
        sums = sums or [torch.zeros_like(d) for _ in range(4)]
        a, b, c, e = sums
        sign = d.sign()
        a.add_(d, alpha=weight)
        b.add_(d.abs(), alpha=weight)
        c.add_(sign, alpha=weight)
        e.add_(sign.abs_(), alpha=weight)
    elected = (a if election == "mass" else c).sign()
    total = (a + elected * b) / (e + elected * c).clamp_min(torch.finfo(a.dtype).tiny)
    return torch.where(elected != 0, total, 0)


TIES = Method(
    "ties",
    "trim small changes, elect signs, average what agrees",
    "W = W_0 + alpha mean of { trim(D_t) : sign = elected sign }",
    Paper(
        "yadav2023ties",
        "Yadav, Prateek and others",
        "TIES-Merging: Resolving Interference When Merging Models",
        "NeurIPS",
        2023,
        "https://arxiv.org/abs/2306.01708",
    ),
    TIESConfig,
    merge_ties,
    survey=survey_thresholds,
)
