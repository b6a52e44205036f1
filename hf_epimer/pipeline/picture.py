"""The picture in the card: accuracy per task, of the merge between its base and the fine-tuned models.

The ground is transparent and every colour stands out from white and from black alike, so that the picture can be read
on the Hub's light and dark pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING

from hf_epimer.plotting import COLOURS, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_epimer.evaluation.results import Results

TEXT = "#7a7a7a"
BASE, MERGED, FINE_TUNED = "#8c8c8c", COLOURS[0], COLOURS[5]

_BAR = 0.26
"""Height of a bar; a task takes 1."""


def accuracy_bars(results: Results, limit: int | None = None) -> Figure:
    """A group of bars for each task, and one for the average; base and fine-tuned models where they were measured.

    Args:
        limit: on how many images of each task, if not on all.
    """
    series: dict[str, tuple[str, Mapping[str, float]]] = {
        "base": (BASE, results.of_base),
        "merged": (MERGED, results.accuracies),
        "fine-tuned, each on its task": (FINE_TUNED, results.fine_tuned),
    }
    shown = {label: (colour, values) for label, (colour, values) in series.items() if values}
    tasks = list(results.tasks)
    places = [float(number) for number in range(len(tasks))]
    figure = new_figure(8.0, 1.5 + (0.2 + 0.2 * len(shown)) * (len(tasks) + 1))
    axes = figure.subplots()
    for number, (label, (colour, values)) in enumerate(shown.items()):
        shift = (number - (len(shown) - 1) / 2) * _BAR
        known = {task: place for task, place in zip(tasks, places) if task in values}
        rows = [(place + shift, 100 * values[task]) for task, place in known.items()]
        if len(known) == len(tasks):
            rows.append((len(tasks) + 0.3 + shift, 100 * fmean(values.values())))
        bars = axes.barh([place for place, _ in rows], [width for _, width in rows], _BAR, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize="small", color=TEXT)
    axes.set_yticks([*places, len(tasks) + 0.3], [*tasks, "average"])
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)  # room for the number beside a full bar
    axes.set_xticks(range(0, 101, 20))
    images = f"first {limit} test images of a task" if limit else "test split"
    axes.set_xlabel(f"top-1 accuracy on the {images} (%)", color=TEXT)
    axes.set_title(_finding(results), loc="left", fontsize="medium", color=TEXT)
    tidy(axes)
    axes.tick_params(colors=TEXT)
    axes.spines[:].set_color(TEXT)
    if len(shown) > 1:
        figure.legend(loc="outside lower center", ncols=len(shown), frameon=False, labelcolor=TEXT)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure


def _finding(results: Results) -> str:
    text = f"The merge reaches {results.average:.1%} on average"
    if results.of_base:
        text += f", its base {fmean(results.of_base.values()):.1%}"
    if len(results.fine_tuned) == len(results.tasks):
        text += f", the fine-tuned models {fmean(results.fine_tuned.values()):.1%}"
    return text
