"""Figures 2 and 3 as pictures, beside the JSON of their tables.

Ours and the paper's are rarely of the same checkpoints: each has a colour of its own, with its family in the legend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from hf_epimer import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALIKE = 0.005
"""Accuracies that differ by less are called the same in a title."""


def write(file: Path, draw: Callable[[], Figure]) -> None:
    """Save a picture, where matplotlib is there; the table is written without it."""
    if not plotting.available():
        return say_missing()
    plotting.save({file.name: draw()}, file.parent)
    Console(highlight=False, soft_wrap=True).print(f"written {file}", markup=False)


def say_missing() -> None:
    """One line on why there is no picture and how to get matplotlib."""
    Console(highlight=False, soft_wrap=True).print(f"no picture: {plotting.MISSING}", markup=False)


def heterogeneity_and_margin(
    ranks: Sequence[int],
    eta: Sequence[float],
    share: Sequence[float],
    margins: Mapping[str, Sequence[float | None]],
) -> Figure:
    """The paper's Figure 2: what Theorem 3 says curvature can do, beside what it did.

    Args:
        ranks: ascending.
        eta: at every rank, metrics of trace 1, summed over layers.
        share: the same as a share of the flat mean's spread.
        margins: whose -> accuracy of EpiMer less that of TSV-M at every rank, in points; ours first.
    """
    figure = plotting.new_figure(9.0, 4.0)
    left, right = figure.subplots(1, 2)
    places = range(len(ranks))
    _bars(left, places, eta, 0.55, plotting.COLOURS[0], [f"{part:.1%}" for part in share])
    left.set_ylim(0, 1.15 * max(eta) or 1)
    left.ticklabel_format(axis="y", scilimits=(-2, 3))
    left.set_ylabel("η, every metric divided by its trace")
    left.set_title("heterogeneity of curvature\n(above: its share of the flat mean's spread)", fontsize="medium")
    width = 0.75 / len(margins)
    for index, (whose, values) in enumerate(margins.items()):
        known = [place for place in places if values[place] is not None]
        heights = [float(values[place] or 0) for place in known]
        shifted = [place + (index - (len(margins) - 1) / 2) * width for place in known]
        text = [_signed(height) for height in heights]
        _bars(right, shifted, heights, 0.93 * width, plotting.COLOURS[index], text, label=whose)
    right.axhline(0, color="k", linewidth=0.8)
    right.margins(y=0.12)
    right.set_ylabel("EpiMer less TSV-M (points)")
    right.set_title("margin in average accuracy,\neach at its best alpha", fontsize="medium")
    for axes in (left, right):
        axes.set_xticks(places, [str(rank) for rank in ranks])
        axes.set_xlabel("rank (directions per task and layer)")
        axes.tick_params(axis="x", length=0)
        plotting.tidy(axes)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(margins), frameon=False)
    ours = next(iter(margins.values()))
    highest = max(places, key=lambda place: eta[place])
    best = max(places, key=lambda place: -math.inf if (margin := ours[place]) is None else margin)
    margin = f"EpiMer's margin best at rank {ranks[best]} ({_signed(float(ours[best] or 0))} points)"
    figure.suptitle(f"η is largest at rank {ranks[highest]}, {margin}")
    return figure


def accuracy_by_share(
    by_share: Mapping[float, Sequence[float]],
    stored: Mapping[str, Sequence[float]],
    samples: int,
    whose: str,
    paper: Mapping[str, float],
) -> Figure:
    """The paper's Figure 3: EpiMer's average accuracy against how much data its Fisher information saw.

    Args:
        by_share: share of the training data -> average accuracy with every seed, in [0, 1].
        stored: how an estimate from `samples` samples is stored -> the same; these stand beside the curve.
        samples: a task.
        whose: what the checkpoints are.
        paper: whose -> average accuracy with all the data, where it is of the same tasks.
    """
    figure = plotting.new_figure(8.5, 4.2)
    curve, beside = figure.subplots(1, 2, sharey=True, width_ratios=(3.2, 1))
    shares = sorted(by_share)
    means = [_mean(by_share[share]) for share in shares]
    colour = plotting.COLOURS[0]
    curve.fill_between(
        shares,
        [100 * min(by_share[share]) for share in shares],
        [100 * max(by_share[share]) for share in shares],
        color=colour,
        alpha=0.2,
        linewidth=0,
        label="range over seeds",
    )
    curve.plot(shares, [100 * mean for mean in means], color=colour, marker="o", label=whose)
    for index, (label, accuracy) in enumerate(paper.items(), start=1):
        style = {"color": plotting.COLOURS[index], "marker": plotting.MARKERS[index], "linestyle": "none"}
        curve.plot([1.0], [100 * accuracy], markersize=9, markeredgecolor="k", label=label, **style)
    curve.set_xscale("log")
    curve.set_xticks(shares, [f"{100 * share:g}" for share in shares])
    curve.minorticks_off()
    curve.set_xlabel("training data that the Fisher information saw (%)")
    curve.set_ylabel("average accuracy on the tests (%)")
    for place, values in enumerate(stored.values()):
        beside.plot([place, place], [100 * min(values), 100 * max(values)], color=colour, alpha=0.3, linewidth=6)
        beside.plot(place, 100 * _mean(values), color=colour, marker="o")
    beside.set_xticks(range(len(stored)), list(stored))
    beside.set_xlim(-0.6, len(stored) - 0.4)
    beside.set_xlabel(f"{samples} samples, stored as")
    for axes in (curve, beside):
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        plotting.tidy(axes)
    beside.spines["left"].set_visible(False)
    beside.tick_params(axis="y", length=0)
    handles, labels = curve.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(_how_much(shares, means), fontsize="medium")
    return figure


def _how_much(shares: Sequence[float], means: Sequence[float]) -> str:
    """The title: what the least and the most data give, and from which share on accuracy is that of the most."""
    worse = [place for place, mean in enumerate(means) if abs(mean - means[-1]) > ALIKE]
    enough = max(worse, default=-1) + 1
    least, most, whole = (f"{100 * shares[place]:g}%" for place in (0, enough, -1))
    title = f"Fisher information from {least} of the data: {means[0]:.1%}; from {whole}: {means[-1]:.1%}"
    return f"{title};\nfrom {most} on accuracy stays within {100 * ALIKE:g} points of that"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _signed(value: float) -> str:
    """With a minus as wide as a plus, as on the axes."""
    return f"{value:+.2f}".replace("-", "−")


def _bars(
    axes: Axes,
    places: Sequence[float],
    heights: Sequence[float],
    width: float,
    colour: str,
    texts: Sequence[str],
    label: str | None = None,
) -> None:
    """Bars with a text at the end of each, below those that point down."""
    axes.bar(places, heights, width, color=colour, label=label)
    for place, height, text in zip(places, heights, texts, strict=True):
        up = height >= 0
        axes.annotate(
            text,
            (place, height),
            (0, 2 if up else -2),
            textcoords="offset points",
            ha="center",
            va="bottom" if up else "top",
            fontsize="small",
        )
