"""Pictures, each for one look: the title says the finding, the axes carry units, everyone can tell the colours apart.

matplotlib is an extra (`pip install 'hf-epimer[plots]'`) and imported where it is used. Figures are made without
pyplot, so that no window system and no state of the process is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "the pictures need matplotlib: pip install 'hf-epimer[plots]'"

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")
"""Okabe and Ito's palette, told apart with every common kind of colour vision; grey for yellow, faint on white."""

MARKERS = "osD^vPX*"
DPI = 150


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def save(figures: Mapping[str, Figure], folder: Path) -> list[str]:
    """Write figures as PNG; the names of the files."""
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=DPI)
    return list(figures)


def energy_by_rank(
    labels: Sequence[str],
    ranks: Sequence[int],
    kept: Sequence[Sequence[float]],
    singular: Sequence[Sequence[float]],
) -> Figure:
    """How much of every task vector is kept at every rank: by the shared basis, and by a basis of its own.

    Args:
        labels: of the tasks.
        ranks: ascending.
        kept: rank -> task -> share, in [0, 1].
        singular: the same for the task's own leading singular directions.
    """
    figure = _figure(7.5, 4.6)
    axes = figure.subplots()
    for task, label in enumerate(labels):
        colour, marker = COLOURS[task % len(COLOURS)], MARKERS[task // len(COLOURS) % len(MARKERS)]
        axes.plot(ranks, [100 * row[task] for row in kept], color=colour, marker=marker, label=label)
        axes.plot(ranks, [100 * row[task] for row in singular], color=colour, linestyle=":", linewidth=1)
    axes.axhline(50, color="0.4", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set_xlabel("rank (directions per task and layer)")
    axes.set_ylabel("share of the task vector kept (%, squared norm)")
    rows = zip(kept[-1], singular[-1], labels)
    least, alone, worst = min(row for row in rows if math.isfinite(row[0]))
    axes.set_title(
        f"At rank {ranks[-1]} the shared basis keeps {least:.0%} of {worst}, the least of all tasks;\n"
        f"its own directions alone would keep {alone:.0%}",
        fontsize="medium",
    )
    _tidy(axes)
    handles, _ = axes.get_legend_handles_labels()
    (dotted,) = axes.plot([], [], color="0.3", linestyle=":", label="own directions\nalone")
    axes.legend(handles=[*handles, dotted], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def cosine_matrix(labels: Sequence[str], cosines: Sequence[Sequence[float]]) -> Figure:
    """Cosines between task vectors, T x T; NaN for a task vector that is zero."""
    size = len(labels)
    pairs = {(s, t): cosines[s][t] for s in range(size) for t in range(s) if math.isfinite(cosines[s][t])}
    figure = _figure(max(5.0, 2.6 + 0.62 * size), max(3.6, 2.0 + 0.62 * size))
    axes = figure.subplots()
    limit = max([0.3, *map(abs, pairs.values())])  # weak cosines stay pale
    shown = [[math.nan if s == t else cosines[s][t] for t in range(size)] for s in range(size)]
    image = axes.imshow(shown, cmap="PuOr_r", vmin=-limit, vmax=limit)
    for s in range(size):
        for t in range(size):
            if s != t and math.isfinite(cosines[s][t]):
                dark = abs(cosines[s][t]) > 0.6 * limit
                axes.text(t, s, f"{cosines[s][t]:.2f}", ha="center", va="center", color="w" if dark else "k")
    axes.set_xticks(range(size), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), labels)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="cosine of the task vectors", shrink=0.8)
    axes.set_title(_closest(labels, pairs), fontsize="medium")
    return figure


def _closest(labels: Sequence[str], pairs: Mapping[tuple[int, int], float]) -> str:
    if not pairs:
        return "No two task vectors to compare"
    against, along = min(pairs, key=lambda pair: pairs[pair]), max(pairs, key=lambda pair: pairs[pair])
    if pairs[against] < 0:
        s, t = against
        return f"{labels[t]} and {labels[s]} point most\nagainst each other (cosine {pairs[against]:.2f})"
    s, t = along
    return f"No two tasks point against each other;\n{labels[t]} and {labels[s]} share most (cosine {pairs[along]:.2f})"


def eta_by_layer(
    literal: Mapping[str, tuple[float, float]], normalized: Mapping[str, tuple[float, float]], rank: int
) -> Figure:
    """Where curvature acts: eta of every matrix, stacked by block, and its share of the flat mean's spread.

    Args:
        literal: name -> (eta, F(c_bar)), in twice the loss.
        normalized: the same with every metric divided by its trace.
        rank: for the title.
    """
    kinds = list(dict.fromkeys(_place(name)[1] for name in literal))
    blocks = sorted({_place(name)[0] for name in literal})
    figure = _figure(max(8.0, 3.2 + 0.5 * len(blocks)), 6.4)
    above, below = figure.subplots(2, 1, sharex=True)
    panels = (
        (above, literal, 0.5, "second-order loss that curvature\ncan save, η/2 (nats)", "curvature as measured"),
        (below, normalized, 1.0, "η, every metric divided\nby its trace", "every task with the same say"),
    )
    for axes, values, factor, unit, title in panels:
        tops = [0.0] * len(blocks)
        for index, kind in enumerate(kinds):
            heights = [_sum(values, block, kind)[0] * factor for block in blocks]
            axes.bar(range(len(blocks)), heights, 0.7, tops, color=COLOURS[index % len(COLOURS)], label=kind)
            tops = [top + height for top, height in zip(tops, heights)]
        for index, block in enumerate(blocks):
            eta, spread = _sum(values, block)
            text = f"{eta / spread:.1%}" if spread > 0 else ""
            axes.annotate(text, (index, tops[index]), (0, 2), textcoords="offset points", ha="center", fontsize="small")
        axes.set_ylabel(unit)
        axes.set_title(title, fontsize="medium", loc="left")
        axes.set_ylim(0, 1.15 * max(tops) or 1)
        axes.ticklabel_format(axis="y", scilimits=(-2, 3))
        _tidy(axes)
    below.set_xticks(range(len(blocks)), [str(block) if block >= 0 else "embed" for block in blocks])
    below.set_xlabel("block (above each bar: share of the loss of plain averaging in the basis)")
    handles, names = above.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right center", frameon=False)
    eta, spread = _sum(literal)
    share = eta / spread if spread > 0 else 0.0
    figure.suptitle(f"Rank {rank}: curvature can save {share:.1%} of the loss of plain averaging,\n{_largest(literal)}")
    return figure


def _largest(values: Mapping[str, tuple[float, float]]) -> str:
    totals: dict[str, float] = {}
    for name, (eta, _) in values.items():
        totals[_place(name)[1]] = totals.get(_place(name)[1], 0.0) + eta
    largest = max(totals, key=lambda kind: totals[kind])
    whole = math.fsum(totals.values())
    return f"the largest part ({totals[largest] / whole:.0%} of it) in {largest}" if whole > 0 else "nowhere"


def _sum(
    values: Mapping[str, tuple[float, float]], block: int | None = None, kind: str | None = None
) -> tuple[float, float]:
    own = [
        value for name, value in values.items() if block in (None, _place(name)[0]) and kind in (None, _place(name)[1])
    ]
    return math.fsum(eta for eta, _ in own), math.fsum(spread for _, spread in own)


def _place(name: str) -> tuple[int, str]:
    """Block and kind of a matrix from its name; -1 outside of the blocks."""
    parts = name.removesuffix(".weight").split(".")
    return next((int(part) for part in parts if part.isdigit()), -1), parts[-1]


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
    figure = _figure(4.3 * columns + 0.4, 4.1 * rows + 0.9)
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
            own = tuned[task]
            axes.set_title(
                f"{task}: {models[own][task]:.2f} at its own model\n(star, {outside[own]:.1f} away from the plane)",
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
        name: math.fsum(own.values()) / len(own) for name, own in models.items() if name not in tuned and name != "base"
    }
    best = f"The lowest mean loss on the grid is {min(map(min, mean)):.2f}"
    listed = ", ".join(f"{name} {value:.2f}" for name, value in merges.items())
    return f"{best};\nthe merges' own, in the plane or outside of it: {listed}" if merges else best


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
