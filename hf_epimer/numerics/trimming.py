"""Trimming task vectors to their largest entries, and averaging those that agree in sign (TIES-Merging).

The k-th largest magnitude of a whole model is found exactly, without sorting, in two passes. Non-negative floats are
ordered like their bit patterns. A few entries say in which window of patterns, some percent of a magnitude wide, the
k-th largest lies; a second pass counts what is above the window, and every single pattern within. Its counts show where
the few have misled: then all entries say where the window is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

Election = Literal["mass", "count"]

STRIDE = 61
"""One entry of so many is looked at first: a prime, for other strides would see few columns of a matrix."""

COARSE = 17
"""log2 of the patterns in one bin of the first histogram; 2^23 patterns are a factor of two."""

WINDOW = 1 << 19
"""Patterns that are counted one by one: a bin of the histogram, and one and a half on either side."""

INFINITY = 0x7F800000
"""The pattern above those of all finite magnitudes."""

BLOCK = 1 << 16
"""Entries worked on at a time: few enough for a processor's cache."""


OverTaskVectors = Callable[[Callable[[Tensor], Any]], Iterable[Any]]
"""f -> f(task vectors, T x ...) of every layer."""


def model_thresholds(over_layers: OverTaskVectors, density: float) -> Tensor:
    """The smallest |D_t| among the `density` largest of the whole model, length T; 0 where fewer differ from 0.

    Reads all layers twice, four times where few entries misled.
    """
    for stride in (STRIDE, 1):
        counts = over_layers(partial(_histogram, stride=stride))
        histogram = sum(counts, start=torch.zeros((), dtype=torch.int64))
        bins = _locate(histogram, _kept(density, int(histogram[0].sum())))
        starts = (bins << COARSE) - (WINDOW - (1 << COARSE)) // 2
        starts = starts.clamp(1, INFINITY - WINDOW)  # a 0 is trimmed as it is
        patterns = _patterns_within(starts, over_layers, density)
        if patterns is not None:
            return patterns.to(torch.int32).view(torch.float32)
    raise AssertionError("the histogram of all entries names the window that they are in")


def layer_thresholds(task_vectors: Tensor, density: float) -> Tensor:
    """The smallest |D_t| among the `density` largest of one layer, T x ... -> length T."""
    magnitudes = task_vectors.abs().reshape(len(task_vectors), -1)
    kept = _kept(density, magnitudes.shape[1])
    return magnitudes.kthvalue(magnitudes.shape[1] - kept + 1, dim=1).values


def elect_and_average(
    task_vectors: Tensor, weights: Tensor, election: Election, thresholds: Tensor | None = None
) -> Tensor:
    """Weighted average of the entries that are not 0 and carry the elected sign.

    Args:
        task_vectors: T x ...
        weights: l_t, length T.
        election: the sign of the sum of values (`mass`), or of the sum of signs (`count`).
        thresholds: entries of smaller magnitude count as 0, length T; None to take all as they are.
    """
    flat = task_vectors.reshape(len(task_vectors), -1)
    merged = torch.empty_like(flat[0])
    # hardshrink keeps what is strictly larger: the largest float below the threshold keeps the threshold itself
    limits = None if thresholds is None else torch.nextafter(thresholds.float().cpu(), torch.tensor(0.0)).tolist()
    for start in range(0, len(merged), BLOCK):
        block, result = flat[:, start : start + BLOCK], merged[start : start + BLOCK]
        kept = block if limits is None else torch.stack([hardshrink(*each) for each in zip(block, limits, strict=True)])
        elected = (weights @ (kept if election == "mass" else kept.sign())).sign()
        agreeing = (kept * elected).clamp_min_(0)  # magnitudes
        total = weights @ agreeing
        weight = weights @ agreeing.sign_()
        torch.mul(elected, total.div_(weight.clamp_min_(torch.finfo(flat.dtype).tiny)), out=result)
    return merged.view(task_vectors.shape[1:])


def _kept(density: float, entries: int) -> int:
    return max(1, round(density * entries))


def _histogram(task_vectors: Tensor, stride: int) -> Tensor:
    """How many |D_t| lie in each bin of 2^COARSE patterns, T x bins, looking at one entry of `stride`."""
    patterns = task_vectors.reshape(len(task_vectors), -1)[:, ::stride].float().abs().view(torch.int32) >> COARSE
    return torch.stack([torch.bincount(row, minlength=INFINITY >> COARSE).cpu() for row in patterns])


def _patterns_within(starts: Tensor, over_layers: OverTaskVectors, density: float) -> Tensor | None:
    """The pattern of the kept-th largest |D_t| per task, where it is within WINDOW patterns from `starts` on, or 0.

    Returns:
        None where it lies elsewhere.
    """
    edges = torch.stack([starts, starts + WINDOW], 1).to(torch.int32).view(torch.float32).tolist()

    def look(task_vectors: Tensor) -> tuple[int, Tensor, list[Tensor]]:
        seen = [_above_and_within(d.flatten(), *e) for d, e in zip(task_vectors, edges, strict=True)]
        return task_vectors[0].numel(), torch.tensor([higher for higher, _ in seen]), [within for _, within in seen]

    counts = torch.zeros(len(starts), WINDOW, dtype=torch.int64)
    above = torch.zeros(len(starts), dtype=torch.int64)
    entries = 0
    for of_layer, higher, within in over_layers(look):
        entries += of_layer
        above += higher
        for row, start, patterns in zip(counts, starts.tolist(), within, strict=True):
            offsets = patterns.long() - start
            row.scatter_add_(0, offsets, torch.ones_like(offsets))
    kept, found = _kept(density, entries) - above, counts.sum(1)
    are_zero = (kept > found) & (starts == 1)
    if bool(((kept < 1) | (kept > found) & ~are_zero).any()):
        return None
    return torch.where(are_zero, 0, starts + _locate(counts, kept))


def _above_and_within(values: Tensor, lower: float, upper: float) -> tuple[int, Tensor]:
    """How many magnitudes are at least `upper`, and the patterns of those from `lower` to below it."""
    above, within = 0, [torch.empty(0)]
    for start in range(0, len(values), BLOCK):
        magnitudes = values[start : start + BLOCK].float().abs()
        # as floats: they are compared and summed four times as fast as truth values
        above += int(torch.ge(magnitudes, upper, out=torch.empty_like(magnitudes)).sum())
        entries = magnitudes.cpu().numpy()  # which selects four times as fast
        within.append(torch.from_numpy(entries[(entries >= lower) & (entries < upper)]))
    return above, torch.cat(within).view(torch.int32)


def _locate(counts: Tensor, kept: Tensor | int) -> Tensor:
    """Per task, T x bins -> T: the bin that holds the kept-th largest value."""
    from_top = counts.flip(1).cumsum(1)
    return counts.shape[1] - 1 - (from_top < torch.as_tensor(kept).view(-1, 1)).sum(1)
