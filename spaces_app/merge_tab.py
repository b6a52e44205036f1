"""The first tab: choose a method, merge, see what came of it, take it home."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import charts
import gradio as gr
from chooser import CHECKPOINTS, Chooser
from options import DEFAULT_METHOD, PLAIN, all_options, chosen_options, described_options, option_inputs, shown_for
from push_box import build_push_box
from run_button import build_run_button, steps, wire
from session import Session
from tools import described

from hf_epimer import METHODS

WELCOME = (
    "<div class='ep-welcome'><h3>One model instead of several</h3><p>Each model of the zoo was fine-tuned on one task "
    "and is good at that one alone. Press <b>Merge</b>: in a few seconds their weights become one model for all tasks, "
    "without training, and you see how good it is beside the plain mean, TSV-M and the models themselves.</p></div>"
)

PLACES = 6
"""Outputs beside the bar."""


def build_merge_tab(session: Session, chooser: Chooser) -> gr.State:
    """Lay it out and wire it; the state holds the last merge of a visitor."""
    merged = gr.State(None)
    with gr.Row(elem_classes="ep-columns"):
        with gr.Column(scale=4, min_width=300):
            choices = [(charts.title_of(name), name) for name in METHODS]
            method = gr.Dropdown(choices, value=DEFAULT_METHOD, label="Method")
            about = gr.HTML(_about(DEFAULT_METHOD))
            button = build_run_button("merge", "Merge")
            names = list(all_options())
            with gr.Row(elem_classes="ep-tight"):
                plain = option_inputs([name for name in names if name in PLAIN])
            with gr.Accordion("More options of this method", open=False) as fold:
                folded = option_inputs([name for name in names if name not in PLAIN])
            inputs = dict(zip(names, [*plain, *folded], strict=True))
            calibrate = gr.Checkbox(
                METHODS[DEFAULT_METHOD].calibrates,
                label="Calibrate",
                info="Solve every layer again on training images of each task: takes longer, loses far less",
            )
            images = gr.Slider(
                0, 500, value=200, step=50, label="Test images per task", info="To measure accuracy; 0 for none"
            )
        with gr.Column(scale=7, min_width=300, elem_classes="ep-result"):
            result = gr.HTML(WELCOME, elem_id="merge-result")
            with gr.Column(visible=False) as after:
                download = gr.DownloadButton("Download the merged model (zip)", variant="secondary")
                with gr.Accordion("Push it to the Hub", open=False):
                    build_push_box(session, merged)
                with gr.Accordion("Model card", open=False):
                    card = gr.Markdown(elem_id="merge-card")
                with gr.Accordion("All numbers", open=False):
                    numbers = gr.JSON(show_label=False)

    @described(CHECKPOINTS=CHECKPOINTS, OPTIONS=described_options())
    def merge(
        source: str,
        zoo_models: list[str],
        typed: str,
        base: str,
        method: str,
        calibrate: bool,
        images: float,
        request: gr.Request,
        **values: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Merge fine-tuned CLIP vision models into one, without training, and measure it on their tasks.

        What is left out has its default. Options that methods have:
        OPTIONS

        Args:
            CHECKPOINTS
            method: such as epimer, epimer-core, tsv-m, mean or ties.
            calibrate: solve every layer again on training images of each task: slower, and loses far less.
            images: test images per task to measure accuracy on; 0 to measure nothing.
            values: options of the method, such as rank and alpha; those of other methods are not looked at.

        Returns:
            A table as HTML, the merged model as a zip, its card, and all numbers; {"error": a sentence} if it failed.
        """

        def arguments() -> tuple[Any, ...]:
            selection, options = session.selection(source, zoo_models, typed, base), chosen_options(method, values)
            return selection, method, options, calibrate, int(images) or None, str(session.workspace.shared)

        for shown, result in steps(session, request, "merge", PLACES, "merge_and_measure", arguments, keep=True):
            yield shown or (
                "",
                result,
                _shown(result, on_space=session.settings.on_space),
                gr.update(visible=True),
                result["archive"],
                _card(result["card"]),
                _plain_values(result),
            )

    wire(
        session,
        button,
        merge,
        [*chooser.inputs, method, calibrate, images],
        [button.status, merged, result, after, download, card, numbers],
        inputs,
    )
    method.change(
        lambda name: [_about(name), METHODS[name].calibrates, *shown_for(name)],
        method,
        [about, calibrate, *inputs.values(), fold],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    return merged


def _about(name: str) -> str:
    method = METHODS[name]
    needs = f" Needs {method.needs.title}, estimated on training images where there are none." if method.needs else ""
    return (
        f"<div class='ep-about'><p>{escape(method.summary[:1].upper() + method.summary[1:])}."
        f"{needs}</p><details><summary>Formula and source</summary>"
        f"<code>{escape(method.formula)}</code>"
        f"<p>{escape(method.paper.title)} ({escape(method.paper.cited)})</p></details></div>"
    )


def _shown(result: dict[str, Any], on_space: bool) -> str:
    """What a merge came to."""
    labels = ", ".join(model["label"] for model in result["models"])
    name, is_zoo = charts.title_of(result["name"]), bool(result["selection"].tasks)
    base = "the zoo's base" if is_zoo else result["base"]
    parts = [
        f"<h3>{escape(labels)} <small>merged with {escape(name)} on {escape(base)} in "
        f"{result['seconds']['merging']:.1f} s</small></h3>"
    ]
    if result["rows"]:
        columns = {row["name"]: row["tasks"] for row in result["rows"]}
        merges = [column for column in columns if column not in ("base", "fine-tuned")]
        caption = (
            f"Top-1 accuracy in percent on the first {result['images']} test images of every task. Base: zero-shot, "
            "before fine-tuning. Fine-tuned: each model on its own task. Bold: the best merge."
        )
        parts.append(charts.accuracy_table(columns, merges, caption, result["name"]))
        parts.append(charts.accuracy_bars(columns, result["name"]))
    else:
        parts.append(charts.notice("Merged. Nothing was measured, as you wished."))
    if not (is_zoo and on_space):  # there the zoo's folder is nobody's but the Space's
        parts.append(
            f"<details><summary>The same at a terminal</summary><pre>{escape(result['command'])}</pre></details>"
        )
    return "".join(parts)


def _card(text: str) -> str:
    """The card with its metadata as a block of code, which Markdown would swallow."""
    _, metadata, body = text.split("---\n", 2)
    return f"{body.strip()}\n\n#### Metadata\n\n```yaml\n{metadata.strip()}\n```"


def _plain_values(result: dict[str, Any]) -> dict[str, Any]:
    """Without what is of this machine only."""
    hidden = ("selection", "folder", "archive", "card", "command")
    return {name: value for name, value in result.items() if name not in hidden}
