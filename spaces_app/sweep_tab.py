"""Which rank and alpha: a grid in one go, a heat map, and a slider that looks results up without computing anything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import charts
import gradio as gr
from chooser import CHECKPOINTS, Chooser
from run_button import build_run_button, steps, wire
from session import Session
from tools import described

from hf_epimer import METHODS

RANKS = (4, 8, 16, 32)
ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
STEP = 0.25
PLACES = 6

WELCOME = (
    "<div class='ep-welcome'><h3>Which rank, which alpha?</h3><p>Every method is solved once per rank, and measured at "
    "six scales on validation images, which come from the training data and are never test images. Afterwards move "
    "the slider: what you see is looked up, not computed.</p></div>"
)


def build_sweep_tab(session: Session, chooser: Chooser) -> None:
    """Lay it out and wire it."""
    swept = gr.State(None)
    choices = [(charts.title_of(name), name) for name in METHODS]
    with gr.Row(elem_classes="ep-tight"):
        methods = gr.Dropdown(
            choices, value=["epimer", "tsv-m"], multiselect=True, label="Methods", min_width=260, scale=3
        )
        ranks = gr.CheckboxGroup(list(RANKS), value=[8, 16, 32], label="Ranks", min_width=240, scale=2)
        images = gr.Slider(20, 200, value=60, step=20, label="Validation images per task", min_width=200, scale=2)
    button = build_run_button("sweep", "Sweep")
    result = gr.HTML(WELCOME, elem_id="sweep-result")
    with gr.Column(visible=False) as after:
        with gr.Row(elem_classes="ep-tight"):
            alpha = gr.Slider(
                ALPHAS[0], ALPHAS[-1], value=1.0, step=STEP, label="Alpha", elem_id="sweep-alpha", min_width=220
            )
            rank = gr.Radio(list(RANKS), value=16, label="Rank", min_width=220)
        table = gr.HTML("", elem_id="sweep-table")
        with gr.Accordion("All numbers", open=False):
            numbers = gr.JSON(show_label=False)

    @described(CHECKPOINTS=CHECKPOINTS)
    def sweep(
        source: str,
        zoo_models: list[str],
        typed: str,
        base: str,
        methods: list[str],
        ranks: list[int],
        images: float,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Find the best method, rank and alpha for a merge, on validation images.

        Args:
            CHECKPOINTS
            methods: such as epimer, tsv-m and ties.
            ranks: directions per task and layer.
            images: validation images per task.

        Returns:
            Maps of accuracies as HTML, and all numbers; {"error": a sentence} if it failed.
        """

        def arguments() -> tuple[Any, ...]:
            return session.selection(source, zoo_models, typed, base), methods, ranks, ALPHAS, int(images)

        for shown, report in steps(session, request, "sweep", PLACES, "swept", arguments):
            yield shown or ("", report, *_shown(report), report)

    wire(
        session,
        button,
        sweep,
        [*chooser.inputs, methods, ranks, images],
        [button.status, swept, result, after, alpha, rank, numbers],
    )

    def sweep_at(alpha: float, rank: int | None, swept: dict[str, Any] | None) -> str:
        """Show every task's accuracy at one alpha and rank of this session's last sweep.

        Args:
            alpha: the scale of the merged task vector.
            rank: directions per task and layer.

        Returns:
            A table as HTML; empty before a sweep.
        """
        return table_at(swept, alpha, rank) if swept else ""

    gr.on(
        [alpha.change, rank.change, swept.change],
        sweep_at,
        [alpha, rank, swept],
        table,
        api_name="sweep_at",
        queue=False,
        show_progress="hidden",
        trigger_mode="always_last",
    )


def _shown(report: dict[str, Any]) -> tuple[Any, ...]:
    """The maps, and the slider and ranks set to the best setting."""
    best = report["best"]["average"]
    samples = next(iter(report["chosen_on"]["tasks"].values()))["samples"]
    rows = report["results"]
    averages = [row["average"] for row in rows]
    top, bottom = max(averages), max(min(averages), max(averages) - 0.2)
    maps = []
    for method in report["methods"]:
        measured = [row for row in rows if row["method"] == method]
        grid: dict[str, dict[str, float | None]] = {}
        for row in measured:
            columns = [row["alpha"]] if row["alpha"] is not None else report["alphas"]
            for column in columns:
                grid.setdefault(_rank_name(row["rank"]), {})[f"{column:g}"] = row["average"]
        frame = None
        if method == best["method"]:
            frame = (
                _rank_name(best["rank"]),
                f"{best['alpha'] if best['alpha'] is not None else report['alphas'][0]:g}",
            )
        caption = "Rows: rank. Columns: alpha." if method == list(report["methods"])[-1] else ""
        drawn = charts.matrix(grid, top=top, bottom=bottom, digits=1, scale=100, best=frame, caption=caption)
        maps.append(f"<div><h3>{charts.title_of(method)}</h3>{drawn}</div>")
    where = "".join(f", {name} {best[name]:g}" for name in ("rank", "alpha") if best[name] is not None)
    head = charts.notice(
        f"Best on average: {charts.title_of(best['method'])}{where}, {100 * best['average']:.1f}%",
        "good",
        f"Average accuracy on {samples} validation images per task, give or take {100 * best['standard_error']:.1f}.",
    )
    tried = list(report["ranks"])
    rank = best["rank"] if best["rank"] is not None else (tried[0] if tried else None)
    return (
        f"{head}<div class='ep-maps'>{''.join(maps)}</div>",
        gr.update(visible=True),
        gr.update(value=best["alpha"] if best["alpha"] is not None else 1.0),
        gr.update(choices=tried, value=rank, visible=bool(tried)),
    )


def table_at(report: dict[str, Any], alpha: float, rank: int | None) -> str:
    """Every task at one alpha and rank by every method, out of sweep.json."""
    columns: dict[str, dict[str, float]] = {}
    curves: dict[str, dict[float, float]] = {}
    for row in report["results"]:
        if row["rank"] not in (None, rank):
            continue
        if row["alpha"] is None:
            curves[row["method"]] = dict.fromkeys(report["alphas"], row["average"])
        else:
            curves.setdefault(row["method"], {})[row["alpha"]] = row["average"]
        if row["alpha"] is None or abs(row["alpha"] - alpha) < STEP / 2:
            columns[row["method"]] = {name: result["accuracy"] for name, result in row["tasks"].items()}
    named = {charts.title_of(name): curve for name, curve in curves.items()}
    at = f"alpha {alpha:g}" + (f", rank {rank}" if rank is not None else "")
    near = min(report["alphas"], key=lambda other: abs(other - alpha))
    caption = f"Accuracy in percent on validation images at {at}."
    return (
        f"<div class='ep-pair'><div>{charts.accuracy_table(columns, list(columns), caption)}</div>"
        f"<div>{charts.lines(named, below='alpha', caption='Average over the tasks.', cursor=near)}</div></div>"
    )


def _rank_name(rank: int | None) -> str:
    return "" if rank is None else str(rank)
