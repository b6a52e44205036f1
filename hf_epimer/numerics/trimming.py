"""Trimming task vectors to their largest entries, and averaging those that agree in sign (TIES-Merging).

Non-negative floats are ordered like their bit patterns, so the k-th largest magnitude of a whole model is found exactly
and without sorting, by counting patterns in two passes: the high 16 bits of all entries, then the low 16 bits of the
one bin in question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

Election = Literal["mass", "count"]

OverTaskVectors = Callable[[Callable[[Tensor], Tensor]], Iterable[Tensor]]
"""f -> f(task vectors, T x ...) of every layer."""


def model_thresholds(over_layers: OverTaskVectors, density: float) -> Tensor:
    """The smallest |D_t| among the `density` largest of the whole model, length T; reads all layers twice."""
    high = _total(over_layers(lambda deltas: torch.stack([_count(_bits(d) >> 16, 0) for d in deltas])))
    kept = max(1, round(density * int(high[0].sum())))
    bins, above = _locate(high, kept)
    first = [int(number) << 16 for number in bins]

    def low_patterns(deltas: Tensor) -> Tensor:
        return torch.stack([_count(_bits(d), start) for d, start in zip(deltas, first, strict=True)])

    lowest, _ = _locate(_total(over_layers(low_patterns)), kept - above)
    return ((bins << 16) | lowest).to(torch.int32).view(torch.float32)


def layer_thresholds(task_vectors: Tensor, density: float) -> Tensor:
    """The smallest |D_t| among the `density` largest of one layer, T x ... -> length T."""
    magnitudes = task_vectors.abs().reshape(len(task_vectors), -1)
    kept = max(1, round(density * magnitudes.shape[1]))
    return magnitudes.kthvalue(magnitudes.shape[1] - kept + 1, dim=1).values


def trimmed(task_vectors: Tensor, thresholds: Tensor) -> Iterable[Tensor]:
    """Every task vector with entries below its threshold set to 0."""
    # hardshrink keeps what is strictly larger: the largest float below the threshold keeps the threshold itself
    below = torch.nextafter(thresholds.float().cpu(), torch.tensor(0.0)).tolist()
    return (hardshrink(d, limit) for d, limit in zip(task_vectors, below, strict=True))


def elect_and_average(task_vectors: Iterable[Tensor], weights: Tensor, election: Election) -> Tensor:
    """Weighted average of the non-zero entries that carry the elected sign.

    With a = sum l_t d_t, b = sum l_t |d_t|, and the same sums c, e over signs, the entries with sign s sum to
    (a + s b) / 2 and weigh (e + s c) / 2: one task at a time, and no masks.

    Args:
        task_vectors: trimmed, T tensors of one shape.
        weights: l_t, length T.
        election: the sign of the sum of values (`mass`), or of the sum of signs (`count`).
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
