"""Results as HTML that follows the page's theme, light or dark, and fits a phone: tables, bars, lines, matrices.

Everything that comes from outside is escaped. Numbers arrive ready; nothing is computed here but places on the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean

from hf_epimer import METHODS

Accuracies = Mapping[str, float]

ROWS = {"base": "Base", "fine-tuned": "Fine-tuned"}
"""Rows of tables that are no merges."""

COLOURS = ("var(--ep-accent)", "var(--ep-second)", "var(--ep-third)", "var(--ep-fourth)", "var(--ep-fifth)")


def title_of(name: str) -> str:
    """A row's or method's name for the page; of a calibrated merge, which is named after its method, too."""
    method, comma, more = name.partition(",")
    title = METHODS[method].title if method in METHODS else ROWS.get(method)
    return (title or method) + comma + more


def notice(text: str, kind: str = "info", detail: str = "") -> str:
    """A sentence in a box: `info`, `good` or `bad`."""
    more = f"<div class='ep-detail'>{escape(detail)}</div>" if detail else ""
    role = "alert" if kind == "bad" else "status"
    return f"<div class='ep-news ep-notice ep-{kind}' role='{role}'><div>{escape(text)}</div>{more}</div>"


def progress_bar(share: float, text: str) -> str:
    """How far a job is."""
    percent = round(100 * min(1.0, max(0.0, share)))
    values = f"role='progressbar' aria-valuemin='0' aria-valuemax='100' aria-valuenow='{percent}'"
    return (
        f"<div class='ep-news ep-progress' {values}>"
        f"<div class='ep-progress-text'><span>{escape(text)}</span><span>{percent}%</span></div>"
        f"<div class='ep-track'><div class='ep-fill' style='width:{percent}%'></div></div></div>"
    )


def accuracy_table(columns: Mapping[str, Accuracies], mark: Sequence[str], caption: str, winner: str = "") -> str:
    """Tasks down, models across; so it fits a phone however many tasks there are.

    Args:
        columns: model -> task -> accuracy.
        mark: the columns among which the best of every row is set in bold.
        caption: under the table.
        winner: the column that is highlighted.
    """
    tasks = list(dict.fromkeys(task for accuracies in columns.values() for task in accuracies))
    rows = {
        task: {name: accuracies[task] for name, accuracies in columns.items() if task in accuracies} for task in tasks
    }
    full = {name: accuracies for name, accuracies in columns.items() if accuracies}
    rows["average"] = {name: fmean(accuracies.values()) for name, accuracies in full.items()}
    rows["worst task"] = {name: min(accuracies.values()) for name, accuracies in full.items()}
    head = "".join(f"<th class='{_mine(name, winner)}'>{escape(title_of(name))}</th>" for name in columns)
    lines = []
    for label, values in rows.items():
        best = max((values[name] for name in mark if name in values), default=None)
        cells = []
        for name in columns:
            text = _percent(values.get(name))
            strong = name in mark and best is not None and values.get(name) == best
            cells.append(f"<td class='{_mine(name, winner)}'>{f'<b>{text}</b>' if strong else text}</td>")
        total = " class='ep-total'" if label in ("average", "worst task") and label not in tasks else ""
        lines.append(f"<tr{total}><th scope='row'>{escape(label)}</th>{''.join(cells)}</tr>")
    return (
        f"<figure class='ep-figure'><div class='ep-scroll'><table class='ep-table'><thead><tr><th></th>{head}</tr>"
        f"</thead><tbody>{''.join(lines)}</tbody></table></div><figcaption>{escape(caption)}</figcaption></figure>"
    )


def accuracy_bars(columns: Mapping[str, Accuracies], winner: str) -> str:
    """One group of bars per task, and one for the average; the fine-tuned models are a tick to be reached."""
    bars = {name: accuracies for name, accuracies in columns.items() if name != "fine-tuned"}
    goal = columns.get("fine-tuned", {})
    tasks = list(dict.fromkeys(task for accuracies in columns.values() for task in accuracies))
    groups = []
    for task in (*tasks, None):
        lines = []
        tick = goal.get(task) if task else (fmean(goal.values()) if goal else None)
        for name, accuracies in bars.items():
            value = accuracies.get(task) if task else fmean(accuracies.values())
            if value is None:
                continue
            mark = f"<i style='left:{100 * tick:.1f}%'></i>" if tick is not None else ""
            lines.append(
                f"<div class='ep-bar {_mine(name, winner)}'><span>{escape(title_of(name))}</span>"
                f"<div class='ep-track'><div class='ep-fill' style='width:{100 * value:.1f}%'></div>{mark}</div>"
                f"<b>{_percent(value)}</b></div>"
            )
        groups.append(f"<div class='ep-group'><h4>{escape(task or 'average')}</h4>{''.join(lines)}</div>")
    legend = "<figcaption><i class='ep-tick'></i> the model fine-tuned on that task alone</figcaption>" if goal else ""
    return f"<figure class='ep-figure'><div class='ep-bars'>{''.join(groups)}</div>{legend}</figure>"


def guesses(rows: Sequence[tuple[str, Mapping[str, float]]], mark: str, truth: str = "") -> str:
    """The most probable classes of a picture by several models, side by side.

    Args:
        rows: model -> class -> probability, the most probable first.
        mark: the model that is highlighted.
        truth: the right class, if it is known.
    """
    cards = []
    for name, classes in rows:
        lines = []
        for label, share in list(classes.items())[:3]:
            right = " ep-right" if truth and label == truth else ""
            lines.append(
                f"<div class='ep-guess{right}'><span>{escape(label)}</span><b>{_percent(share, 0)}%</b>"
                f"<div class='ep-track'><div class='ep-fill' style='width:{100 * share:.1f}%'></div></div></div>"
            )
        verdict = ""
        if truth:
            hit = next(iter(classes)) == truth
            verdict = f"<small class='{'ep-hit' if hit else ''}'>{'right' if hit else 'wrong'}</small>"
        title = f"<h4>{escape(name)}{verdict}</h4>"
        cards.append(f"<div class='ep-card {_mine(name, mark)}'>{title}{''.join(lines)}</div>")
    return f"<div class='ep-cards ep-guesses'>{''.join(cards)}</div>"


def matrix(
    rows: Mapping[str, Mapping[str, float | None]],
    *,
    top: float,
    bottom: float = 0.0,
    digits: int = 2,
    scale: float = 1.0,
    caption: str = "",
    corner: str = "",
    best: tuple[str, str] | None = None,
) -> str:
    """Numbers on coloured ground, the stronger the closer to `top`; below zero in the other colour.

    Args:
        rows: row -> column -> number; None for an empty cell.
        top, bottom: the ends of the colour scale.
        digits, scale: how a number is written.
        corner: above the row names.
        best: the framed cell.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    head = "".join(f"<th title='{escape(column)}'>{escape(column)}</th>" for column in columns)
    lines = []
    for name, row in rows.items():
        cells = []
        for column in columns:
            value = row.get(column)
            if value is None:
                cells.append("<td></td>")
                continue
            strength = min(1.0, max(0.0, (abs(value) - bottom) / ((top - bottom) or 1.0)))
            hue = "var(--ep-accent)" if value >= 0 else "var(--ep-second)"
            text = f"{scale * value:.{digits}f}"
            frame = " class='ep-best'" if best == (name, column) else ""
            ground = f"background:color-mix(in oklab, {hue} {round(8 + 55 * strength)}%, transparent)"
            cells.append(f"<td{frame} style='{ground}'>{text}</td>")
        lines.append(f"<tr><th scope='row'>{escape(name)}</th>{''.join(cells)}</tr>")
    return (
        "<figure class='ep-figure'><div class='ep-scroll'><table class='ep-matrix'><thead><tr>"
        f"<th>{escape(corner)}</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def lines(
    series: Mapping[str, Mapping[float, float]], *, below: str, caption: str = "", cursor: float | None = None
) -> str:
    """Shares in percent against a few numbers, which stand at equal distances.

    Args:
        series: name -> number -> share.
        below: what the numbers are.
        cursor: a number that is marked.
    """
    places = sorted({place for line in series.values() for place in line})
    values = [value for line in series.values() for value in line.values()]
    low, high = 10 * int(10 * min(values)), min(100, 10 * int(10 * max(values) + 1))
    width, height, left, foot = 560, 240, 54, 40
    across = (width - left - 16) / max(1, len(places) - 1)

    def x(place: float) -> float:
        return left + 4 + across * places.index(place)

    def y(value: float) -> float:
        return 10 + (height - foot - 10) * (1 - (100 * value - low) / ((high - low) or 1))

    parts = []
    for tick in range(low, high + 1, 10 if high - low <= 50 else 20):
        at = y(tick / 100)
        parts.append(f"<line class='ep-grid' x1='{left}' x2='{width - 8}' y1='{at:.1f}' y2='{at:.1f}'/>")
        parts.append(f"<text x='{left - 6}' y='{at + 4:.1f}' text-anchor='end'>{tick}%</text>")
    for place in places:
        parts.append(f"<text x='{x(place):.1f}' y='{height - foot + 18}' text-anchor='middle'>{place:g}</text>")
    if cursor in places:
        at = x(cursor)
        parts.append(f"<line class='ep-cursor' x1='{at:.1f}' x2='{at:.1f}' y1='6' y2='{height - foot}'/>")
    for number, line in enumerate(series.values()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in line.items())
        dash = " stroke-dasharray='5 4'" if number >= len(COLOURS) else ""
        parts.append(f"<polyline points='{points}' style='stroke:{colour}'{dash}/>")
        parts += [f"<circle cx='{x(p):.1f}' cy='{y(v):.1f}' r='3.2' style='fill:{colour}'/>" for p, v in line.items()]
    parts.append(f"<text x='{(left + width) / 2:.0f}' y='{height - 1}' text-anchor='middle'>{escape(below)}</text>")
    legend = "".join(
        f"<span><i style='background:{COLOURS[number % len(COLOURS)]}'></i>{escape(name)}</span>"
        for number, name in enumerate(series)
    )
    return (
        f"<figure class='ep-figure'><div class='ep-legend'>{legend}</div><svg class='ep-lines' role='img' "
        f"viewBox='0 0 {width} {height}'>{''.join(parts)}</svg><figcaption>{escape(caption)}</figcaption></figure>"
    )


def _mine(name: str, winner: str) -> str:
    return "ep-mine" if name == winner else ""


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"
