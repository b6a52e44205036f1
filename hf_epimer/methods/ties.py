"""TIES-Merging: trim, elect signs, average what agrees. Yadav et al., NeurIPS 2023.

    trim    keep the `density` largest |D_t| of task t, over the whole model (or per layer); the rest is 0
    elect   sign per entry: of sum l_t D_t (`mass`) or of sum l_t sign(D_t) (`count`)
    merge   average of the kept entries that carry the elected sign, times alpha

The model-wide threshold is exact: non-negative floats are ordered like their bit patterns, so counting patterns in two
passes (the high 16 bits of all entries, then the low 16 bits of the one bin in question) selects it without sorting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_epimer.methods.base import Layer, LayerMerge, Method, Paper, check_options, option

Election = Literal["mass", "count"]


@dataclass(frozen=True)
class TIESConfig:
    """Options of `ties`."""

    density: float = option(0.2, "share of entries kept per task", low=0.0, high=1.0)
    alpha: float = option(1.0, "global scale of the merged task vector")
    election: Literal["mass", "count"] = option("mass", "sign by summed values (TIES) or by votes (EpiMer's baseline)")
    trim: Literal["model", "layer"] = option("model", "keep the largest entries of the whole model or of each layer")

    def __post_init__(self) -> None:
        check_options(self)


def survey_thresholds(config: TIESConfig, read: Callable[[], Iterable[Layer]]) -> Tensor | None:
    """The smallest kept |D_t| over the whole model, length T; None when trimming per layer."""
    if config.trim == "layer":
        return None
    high: Tensor | None = None
    entries = 0
    for layer in read():
        entries += layer.base.numel()
        counts = torch.stack([_count(_bits(d) >> 16) for d in layer.task_vectors])
        high = counts if high is None else high + counts
    assert high is not None
    kept = max(1, round(config.density * entries))
    bins, above = _locate(high, kept)
    low = torch.zeros_like(high)
    for layer in read():
        for task, d in enumerate(layer.task_vectors):
            bits = _bits(d)
            low[task] += _count(bits[(bits >> 16) == bins[task]] & 0xFFFF)
    lowest, _ = _locate(low, kept - above)
    return ((bins << 16) | lowest).to(torch.int32).view(torch.float32)


def _bits(d: Tensor) -> Tensor:
    return d.float().abs().flatten().view(torch.int32)


def _count(values: Tensor) -> Tensor:
    return torch.bincount(values, minlength=1 << 16).cpu()


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
        magnitudes = layer.task_vectors.abs().flatten(1)
        thresholds = magnitudes.kthvalue(magnitudes.shape[1] - kept + 1, dim=1).values
    else:
        thresholds = survey.to(layer.task_vectors)
    shape = (-1, *[1] * layer.base.ndim)
    trimmed = torch.where(layer.task_vectors.abs() >= thresholds.view(shape), layer.task_vectors, 0)
    return LayerMerge(elect_and_average(trimmed, layer.weights, config.election) * config.alpha)


def elect_and_average(task_vectors: Tensor, weights: Tensor, election: Election) -> Tensor:
    """TIES' elect and merge steps: weighted average of the non-zero entries that carry the elected sign.

    Args:
        task_vectors: trimmed, T x ...
        weights: l_t, length T.
        election: `mass` or `count`.
    """
    w = weights.view(-1, *[1] * (task_vectors.ndim - 1))
    votes = task_vectors if election == "mass" else task_vectors.sign()
    elected = (w * votes).sum(0).sign()
    agreeing = w * ((task_vectors.sign() == elected) & (elected != 0))
    return (agreeing * task_vectors).sum(0) / agreeing.sum(0).clamp_min(torch.finfo(task_vectors.dtype).tiny)


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
