"""Before a merge: a verdict, the angles between task vectors, what a rank keeps, and where curvature acts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from typing import Any

import charts
import gradio as gr
from chooser import CHECKPOINTS, Chooser
from run_button import build_run_button, steps, wire
from session import Session
from tools import described

RANKS = (4, 8, 16, 32)
PLACES = 3

WELCOME = (
    "<div class='ep-welcome'><h3>Look before you merge</h3><p>Do the tasks pull in different directions? How many "
    "directions per task are worth keeping? Does curvature change anything over a plain average? It takes one look "
    "at the weights, and no images.</p></div>"
)

_MATRIX = re.compile(r"layers\.(\d+)\.(?:self_attn\.|mlp\.)?(\w+?)(?:_proj)?\.weight")


def build_diagnosis_tab(session: Session, chooser: Chooser) -> None:
    """Lay it out and wire it."""
    button = build_run_button("diagnose", "Diagnose")
    result = gr.HTML(WELCOME, elem_id="diagnose-result")
    with gr.Accordion("All numbers", open=False, visible=False) as after:
        numbers = gr.JSON(show_label=False)

    @described(CHECKPOINTS=CHECKPOINTS)
    def diagnose(
        source: str, zoo_models: list[str], typed: str, base: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Look at fine-tuned CLIP vision models before merging: do their tasks pull in different directions?

        Args:
            CHECKPOINTS

        Returns:
            A verdict as HTML, and all numbers; {"error": a sentence} if it failed.
        """

        def arguments() -> tuple[Any, ...]:
            return session.selection(source, zoo_models, typed, base), RANKS

        for shown, report in steps(session, request, "diagnose", PLACES, "diagnosis", arguments):
            yield shown or ("", _shown(report), gr.update(visible=True), report)

    wire(session, button, diagnose, chooser.inputs, [button.status, result, after, numbers])


def _shown(report: dict[str, Any]) -> str:
    totals = report["totals"]
    verdict = "".join(f"<li>{escape(line)}</li>" for line in report["verdict"])
    note = charts.notice(report["note"]) if report["note"] else ""
    cosines = _cosines(report["labels"], totals["cosine"])
    return (
        f"<h3>Verdict</h3><ul class='ep-verdict'>{verdict}</ul>{note}"
        f"<div class='ep-pair'><div><h3>Cosines of the task vectors</h3>{cosines}</div>"
        f"<div><h3>What a rank keeps</h3>{_energy(report['labels'], totals['ranks'])}</div></div>"
        f"{_eta(report)}"
    )


def _cosines(labels: list[str], cosines: list[list[float | None]]) -> str:
    rows = {
        label: {other: None if i == j else cosines[i][j] for j, other in enumerate(labels)}
        for i, label in enumerate(labels)
    }
    caption = "Near 0: the tasks change different directions, and merge well. Well below 0: they undo each other."
    known = [abs(value) for row in rows.values() for value in row.values() if value is not None]
    return charts.matrix(rows, top=max([0.3, *known]), caption=caption)


def _energy(labels: list[str], ranks: list[dict[str, Any]]) -> str:
    series = {
        label: {row["rank"]: row["energy_kept"][task] for row in ranks if row["energy_kept"][task] is not None}
        for task, label in enumerate(labels)
    }
    caption = "Share of every task vector (squared norm) that the shared basis keeps with so many directions per task."
    return charts.lines(series, below="rank", caption=caption)


def _eta(report: dict[str, Any]) -> str:
    """eta as a share of the flat mean's spread, block by block; empty without Fisher information."""
    rank = report["totals"]["ranks"][-1]["rank"]
    rows: dict[str, dict[str, float | None]] = {}
    beside: dict[str, dict[str, float | None]] = {}
    for layer in report["layers"]:
        at = next((at_rank for at_rank in layer["ranks"] if at_rank["rank"] == rank), None)
        if not at or not at["curvature"]:
            continue
        place = _MATRIX.search(layer["name"])
        share = at["curvature"]["eta_share"]
        if place:
            rows.setdefault(place[2], {})[place[1]] = share
        else:
            beside.setdefault(layer["name"].removeprefix("vision_model."), {})["share"] = share
    if not rows:
        return ""
    top = max([0.02, *(value for row in rows.values() for value in row.values() if value is not None)])
    caption = (
        f"eta at rank {rank}, in percent of the flat mean's spread: what weighing by curvature changes over a plain "
        "average. Rows are the matrices of a block, columns the blocks from first to last. Under 1% is hardly anything."
    )
    more = "; ".join(f"{name}: {100 * (curvature['share'] or 0):.1f}%" for name, curvature in beside.items())
    if more:
        caption += f" Outside of the blocks: {more}."
    return "<h3>Where curvature acts</h3>" + charts.matrix(
        rows, top=top, digits=0 if top > 0.1 else 1, scale=100, caption=caption, corner="block"
    )
