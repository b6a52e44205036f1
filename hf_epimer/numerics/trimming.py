"""Trimming task vectors to their largest entries, and averaging those that agree in sign (TIES-Merging).

The k-th largest magnitude of a whole model is found exactly, without sorting, in two passes. Non-negative floats are
ordered like their bit patterns. A few entries say in which window of patterns, some percent of a magnitude wide, the
k-th largest lies; a second pass counts what is above the window, and every single pattern within. Its counts show where
the few have misled: then all entries say where the window is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

Election = Literal["mass", "count"]

Array: TypeAlias = Any
"""A NumPy array of magnitudes, T x entries: NumPy compares and selects several times as fast as torch."""

STEP = 61
"""One entry of so many is looked at first: a prime, for other steps would see few columns of a matrix."""

COARSE = 16
"""log2 of the patterns in one bin of the first histogram; 2^23 patterns are a factor of two."""

WINDOW = 1 << 19
"""Patterns that are counted one by one: a bin of the histogram, and three and a half, some 2%, on either side."""

INFINITY = 0x7F800000
"""The pattern above those of all finite magnitudes."""

BLOCK = 1 << 16
"""Entries of each task worked on at a time: few enough for a processor's cache."""

OverTaskVectors = Callable[[Callable[[Tensor], Any], int], Iterable[Any]]
"""(f, step) -> f(task vectors, T x ...) of every layer, or of one in `step` of its entries."""


def model_thresholds(over_layers: OverTaskVectors, density: float) -> Tensor:
    """The smallest |D_t| among the `density` largest of the whole model, length T; 0 where fewer differ from 0.

    Reads a few entries and all layers once, and twice more where the few misled.
    """
    for step in (STEP, 1):
        histogram = _histogram(over_layers, step)
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


def _histogram(over_layers: OverTaskVectors, step: int) -> Tensor:
    """How many |D_t| lie in each bin of 2^COARSE patterns, T x bins."""

    def look(task_vectors: Tensor) -> Tensor:
        return task_vectors.reshape(len(task_vectors), -1).float().abs().view(torch.int32) >> COARSE

    counts = torch.zeros(0)
    for bins in over_layers(look, step):
        if not len(counts):
            counts = torch.zeros(len(bins), INFINITY >> COARSE, dtype=torch.int64)
        for row, own in zip(counts, bins.cpu(), strict=True):
            _count(row, own)
    return counts


def _count(counts: Tensor, values: Tensor) -> None:
    """Add how often each value occurs to the counts of 0, 1, .."""
    counts.scatter_add_(0, values.long(), torch.ones_like(values, dtype=counts.dtype))


def _patterns_within(starts: Tensor, over_layers: OverTaskVectors, density: float) -> Tensor | None:
    """The pattern of the kept-th largest |D_t| per task, where it is within WINDOW patterns from `starts` on, or 0.

    Returns:
        None where it lies elsewhere.
    """
    lower, upper = (edge.to(torch.int32).view(torch.float32).numpy()[:, None] for edge in (starts, starts + WINDOW))

    def look(task_vectors: Tensor) -> tuple[int, Tensor, list[Tensor]]:
        flat = task_vectors.reshape(len(task_vectors), -1).float().cpu().numpy()
        blocks = [
            _above_and_within(flat[:, start : start + BLOCK], lower, upper)
            for start in range(0, max(1, flat.shape[1]), BLOCK)
        ]
        above = torch.stack([higher for higher, _ in blocks]).sum(0)
        return flat.shape[1], above, [torch.cat(rows) for rows in zip(*(within for _, within in blocks))]

    counts = torch.zeros(len(starts), WINDOW, dtype=torch.int64)
    above = torch.zeros(len(starts), dtype=torch.int64)
    entries = 0
    for of_layer, higher, within in over_layers(look, 1):
        entries += of_layer
        above += higher
        for row, start, patterns in zip(counts, starts.tolist(), within, strict=True):
            _count(row, patterns - start)
    kept, found = _kept(density, entries) - above, counts.sum(1)
    are_zero = (kept > found) & (starts == 1)
    if bool(((kept < 1) | (kept > found) & ~are_zero).any()):
        return None
    return torch.where(are_zero, 0, starts + _locate(counts, kept))


def _above_and_within(block: Array, lower: Array, upper: Array) -> tuple[Tensor, list[Tensor]]:
    """Per row, how many magnitudes are at least `upper`, and the patterns of those from `lower` to below it."""
    magnitudes = abs(block)
    are_above = magnitudes >= upper
    are_within = (magnitudes >= lower) ^ are_above
    within = [torch.from_numpy(row[chosen]).view(torch.int32) for row, chosen in zip(magnitudes, are_within)]
    return torch.from_numpy(are_above).count_nonzero(dim=1), within


def _locate(counts: Tensor, kept: Tensor | int) -> Tensor:
    """Per task, T x bins -> T: the bin that holds the kept-th largest value."""
    from_top = counts.flip(1).cumsum(1)
    return counts.shape[1] - 1 - (from_top < torch.as_tensor(kept).view(-1, 1)).sum(1)
