"""Pictures of analyses, each for one look: the title says the finding, the axes carry units."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from hf_epimer.plotting import COLOURS, MARKERS, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

SCALE = 20.0
"""Points of accuracy below the best that a heat map tells apart: merges that collapse must not take all its colours."""


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
    figure = new_figure(7.5, 4.6)
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
    tidy(axes)
    handles, _ = axes.get_legend_handles_labels()
    (dotted,) = axes.plot([], [], color="0.3", linestyle=":", label="own directions\nalone")
    axes.legend(handles=[*handles, dotted], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def cosine_matrix(labels: Sequence[str], cosines: Sequence[Sequence[float]]) -> Figure:
    """Cosines between task vectors, T x T; NaN for a task vector that is zero."""
    size = len(labels)
    pairs = {(s, t): cosines[s][t] for s in range(size) for t in range(s) if math.isfinite(cosines[s][t])}
    figure = new_figure(max(5.0, 2.6 + 0.62 * size), max(3.6, 2.0 + 0.62 * size))
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


def confusion_matrix(task: str, class_names: Sequence[str], confusion: Sequence[Sequence[int]]) -> Figure:
    """Which class is taken for which, in shares of the true class's samples.

    Args:
        confusion: true class -> class it was taken for -> count.
    """
    size = len(class_names)
    totals = [sum(row) for row in confusion]
    shares = [[count / total if total else math.nan for count in row] for row, total in zip(confusion, totals)]
    mistakes = [(shares[i][j], i, j) for i in range(size) for j in range(size) if i != j and confusion[i][j]]
    few = size <= 30  # more names than that cannot be read
    side = min(12.0, 3.5 + (0.32 if few else 0.08) * size)
    figure = new_figure(side + 1.2, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if few:
        axes.set_xticks(range(size), class_names, rotation=90)
        axes.set_yticks(range(size), class_names)
    axes.set_xlabel("taken for" if few else "taken for (class number)")
    axes.set_ylabel("is" if few else "is (class number)")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="share of the class", shrink=0.8)
    hits = sum(confusion[i][i] for i in range(size)) / max(sum(totals), 1)
    title = f"{task}: {hits:.1%} right"
    if mistakes:
        share, i, j = max(mistakes)
        title += f";\nmost often {class_names[i]} is taken for {class_names[j]} ({share:.0%})"
    axes.set_title(title, fontsize="medium")
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
    figure = new_figure(max(8.0, 3.2 + 0.5 * len(blocks)), 6.4)
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
        tidy(axes)
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
    pairs = [
        value for name, value in values.items() if block in (None, _place(name)[0]) and kind in (None, _place(name)[1])
    ]
    return math.fsum(eta for eta, _ in pairs), math.fsum(spread for _, spread in pairs)


def _place(name: str) -> tuple[int, str]:
    """Block and kind of a matrix from its name; -1 outside of the blocks."""
    parts = name.removesuffix(".weight").split(".")
    return next((int(part) for part in parts if part.isdigit()), -1), parts[-1]


def accuracy_heatmap(
    values: Mapping[str, Mapping[tuple[int | None, float | None], float]],
    ranks: Sequence[int],
    alphas: Sequence[float],
    stopped: Collection[tuple[str, int | None, float | None]] = (),
) -> Figure:
    """Average accuracy over the grid: one panel per method, rank by alpha, one colour scale for all.

    Args:
        values: method -> (rank, alpha) -> average accuracy in [0, 1]; None where the method has no rank or no alpha,
            and the number then stands for the whole row or panel.
        ranks, alphas: ascending.
        stopped: (method, rank, alpha) of those measured on a part of the images; in brackets, and never the best.
    """
    rows = [len({rank for rank, _ in accuracies}) for accuracies in values.values()]
    figure = new_figure(max(6.5, 3.4 + 0.75 * len(alphas)), 1.7 + 0.42 * sum(rows) + 0.42 * len(rows))
    panels = figure.subplots(len(values), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    everything = [value for accuracies in values.values() for value in accuracies.values()]
    whole = {
        (name, key): value
        for name, accuracies in values.items()
        for key, value in accuracies.items()
        if (name, *key) not in stopped
    }
    best, marked = max(whole, key=lambda place: whole[place])
    high = 100 * whole[best, marked]
    low = max(min(100 * min(everything), high - 1), high - SCALE)
    for axes, (name, accuracies) in zip(panels, values.items()):
        heights: list[int | None] = [rank for rank in ranks if any(key[0] == rank for key in accuracies)] or [None]
        shown = [
            [100 * accuracies.get((rank, alpha), accuracies.get((rank, None), math.nan)) for alpha in alphas]
            for rank in heights
        ]
        image = axes.imshow(shown, cmap="cividis", vmin=low, vmax=high, aspect="auto")
        for y, rank in enumerate(heights):
            spans: dict[tuple[int | None, float | None], tuple[int, int]] = {
                (rank, alpha): (x, x) for x, alpha in enumerate(alphas) if (rank, alpha) in accuracies
            }
            for key, (first, last) in (spans or {(rank, None): (0, len(alphas) - 1)}).items():
                value = accuracies[key]
                number = f"({100 * value:.1f})" if (name, *key) in stopped else f"{100 * value:.1f}"
                colour = "w" if 100 * value < (low + high) / 2 else "k"
                axes.text((first + last) / 2, y, number, ha="center", va="center", color=colour)
                if (name, key) == (best, marked):
                    axes.add_patch(_frame(first, last, y))
        axes.set_yticks(range(len(heights)), ["" if rank is None else str(rank) for rank in heights])
        axes.set_ylabel(name + ("\nrank" if heights != [None] else ""), rotation=0, ha="right", va="center")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    panels[-1].set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    panels[-1].set_xlabel("alpha, the scale of the merged task vector")
    clipped = 100 * min(everything) < low
    label = "average accuracy on validation images (%)"
    label += "\nin brackets: stopped on a part of them" if stopped else ""
    figure.colorbar(image, ax=list(panels), label=label, shrink=0.9, extend="min" if clipped else "neither")
    names = ("rank", "alpha")
    where = ", ".join(f"{word} {value:g}" for word, value in zip(names, marked) if value is not None)
    figure.suptitle(f"Best on average: {best}{' at ' + where if where else ''}, {high:.1f}%", fontsize="medium")
    return figure


def accuracy_by_alpha(lines: Mapping[str, tuple[int | None, Mapping[float | None, tuple[float, float]]]]) -> Figure:
    """Average and worst task against alpha, every method at one rank; a dashed level for one without alpha.

    Args:
        lines: method -> (its rank or None, alpha -> (average, worst)), in [0, 1]; the alpha None alone for a level.
    """
    figure = new_figure(9.5, 4.4)
    panels = figure.subplots(1, 2, sharex=True)
    titles = ("average over tasks", "worst task")
    for number, (axes, title) in enumerate(zip(panels, titles)):
        best, winner = max(
            (max(pair[number] for pair in pairs_by_alpha.values()), name) for name, (_, pairs_by_alpha) in lines.items()
        )
        for index, (name, (rank, pairs_by_alpha)) in enumerate(lines.items()):
            lap = index // len(COLOURS)  # a colour that comes again has another marker and another dash
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[(index + lap) % len(MARKERS)]
            label = name if rank is None else f"{name}, rank {rank}"
            alphas = [alpha for alpha in pairs_by_alpha if alpha is not None]
            heights = [100 * pair[number] for pair in pairs_by_alpha.values()]
            if not alphas:
                axes.axhline(heights[0], color=colour, linestyle=":" if lap else "--", label=label)
                continue
            style = "-." if lap else "-"
            axes.plot(alphas, heights, color=colour, marker=marker, markersize=4, linestyle=style, label=label)
            top = max(range(len(heights)), key=lambda place: heights[place])
            axes.plot(alphas[top], heights[top], color=colour, marker=marker, markersize=9, markeredgecolor="k")
        everything = [100 * pair[number] for _, pairs_by_alpha in lines.values() for pair in pairs_by_alpha.values()]
        axes.set_ylim(max(min(everything) - 1, 100 * best - SCALE), 100 * best + 2)  # merges that collapsed fall out
        axes.set_title(f"{title}: {winner} reaches {best:.1%}", fontsize="medium", loc="left")
        axes.set_xlabel("alpha, the scale of the merged task vector")
        tidy(axes)
    panels[0].set_ylabel("accuracy on validation images (%)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False)
    return figure


def _frame(first: int, last: int, row: int) -> Patch:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (first - 0.47, row - 0.45), last - first + 0.94, 0.9, fill=False, edgecolor="#D55E00", linewidth=2.5
    )
