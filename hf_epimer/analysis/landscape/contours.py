"""The picture of a loss landscape: the title says the finding, the axes carry units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hf_epimer.plotting import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def loss_contours(
    losses: Mapping[str, Sequence[Sequence[float]]],
    grid: tuple[Sequence[float], Sequence[float]],
    positions: Mapping[str, tuple[float, float]],
    outside: Mapping[str, float],
    models: Mapping[str, Mapping[str, float]],
    tuned: Mapping[str, str],
) -> Figure:
    """The loss of every task, and their mean, over a plane with the models in it.

    Args:
        losses: task -> row of b -> column of a -> loss.
        grid: values of a and of b, distances in the space of weights.
        positions: name -> (a, b).
        outside: name -> its distance from the plane.
        models: name -> task -> the loss of the model itself.
        tuned: task -> the model that was tuned for it; models that are tuned for nothing are the base and merges.
    """
    tasks = list(losses)
    mean = [[math.fsum(cell) / len(tasks) for cell in zip(*rows)] for rows in zip(*losses.values())]
    columns = min(3, len(tasks) + 1)
    rows = -(-(len(tasks) + 1) // columns)
    figure = new_figure(4.3 * columns + 0.4, 4.1 * rows + 0.9)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, task in zip(panels.flat, [*tasks, None]):
        _loss_panel(axes, losses[task] if task else mean, grid)
        for index, (name, place) in enumerate(positions.items()):
            is_own = task is not None and name == tuned[task]
            merge = name not in tuned.values()
            face = "w" if merge else COLOURS[index % len(COLOURS)]
            shape = "*" if is_own else ("s" if name == "base" else "D") if merge else "o"
            axes.plot(
                *place, shape, markersize=15 if is_own else 7, markerfacecolor=face, markeredgecolor="k", zorder=3
            )
            _name_beside(axes, name, place, list(positions.values()))
        if task:
            model = tuned[task]
            axes.set_title(
                f"{task}: {models[model][task]:.2f} at its own model\n(star, {outside[model]:.1f} away from the plane)",
                fontsize="medium",
            )
        else:
            axes.set_title("mean over the tasks", fontsize="medium")
    for axes in panels.flat[len(tasks) + 1 :]:
        axes.set_visible(False)
    figure.supxlabel("first principal axis (distance between weights)", fontsize="medium")
    figure.supylabel("second principal axis (distance between weights)", fontsize="medium")
    figure.suptitle(_lowest(mean, models, set(tuned.values())))
    return figure


def _loss_panel(axes: Axes, values: Sequence[Sequence[float]], grid: tuple[Sequence[float], Sequence[float]]) -> None:
    """Contours a constant factor apart: near a minimum losses differ by hundredths, far from it by whole nats."""
    lowest = min(map(min, values))
    high = max(*map(max, values), 1e-6)
    low = min(max(lowest, high / 100), 0.999 * high)
    steps = 12
    levels = [low * (high / low) ** (step / steps) for step in range(steps + 1)]
    shown = axes.contourf(
        *grid, values, levels, cmap="cividis_r", norm="log", extend="min" if lowest < low else "neither"
    )
    axes.contour(*grid, values, levels, colors="k", linewidths=0.3, alpha=0.5)
    ticks = levels[:: max(1, len(levels) // 5)]
    bar = axes.figure.colorbar(shown, ax=axes, ticks=ticks, shrink=0.85)
    bar.ax.minorticks_off()
    bar.ax.set_yticklabels([f"{tick:.2g}" for tick in ticks])
    bar.set_label("loss (nats)")
    axes.set_aspect("equal")


def _name_beside(axes: Axes, name: str, place: tuple[float, float], others: Sequence[tuple[float, float]]) -> None:
    """The name of a marker on the side where its neighbours are not, and inside of the panel."""
    from matplotlib.patheffects import withStroke

    push = [0.0, 0.0]
    for other in others:
        if other != place:
            for axis in range(2):
                push[axis] += (place[axis] - other[axis]) / math.dist(other, place) ** 3
    left, right = axes.get_xlim()
    share = (place[0] - left) / (right - left)
    beside = abs(push[0]) > abs(push[1]) and (share < 0.6 if push[0] > 0 else share > 0.4)
    sign = 1 if push[0 if beside else 1] > 0 else -1
    axes.annotate(
        name,
        place,
        (9 * sign, 0) if beside else (0, 9 * sign),
        textcoords="offset points",
        ha=("left" if sign > 0 else "right") if beside else "center",
        va="center" if beside else "bottom" if sign > 0 else "top",
        fontsize="small",
        path_effects=[withStroke(linewidth=2.5, foreground="w")],
        zorder=4,
    )


def _lowest(mean: Sequence[Sequence[float]], models: Mapping[str, Mapping[str, float]], tuned: set[str]) -> str:
    merges = {
        name: math.fsum(losses.values()) / len(losses)
        for name, losses in models.items()
        if name not in tuned and name != "base"
    }
    best = f"The lowest mean loss on the grid is {min(map(min, mean)):.2f}"
    listed = ", ".join(f"{name} {value:.2f}" for name, value in merges.items())
    return f"{best};\nthe merges' own, in the plane or outside of it: {listed}" if merges else best
