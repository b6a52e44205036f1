"""The checkpoints, chosen once for all tabs: models of the demo zoo, or references typed in and looked up."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import charts
import gradio as gr
import jobs
from selection import TYPED, ZOO, as_data_url
from session import Session
from tools import described

from hf_epimer import ZOO_TASKS, EpimerError

LOOK_SECONDS = 60
PLACEHOLDER = "dtd=org/vit-b32-dtd\nsvhn=org/vit-b32-svhn@main"


CHECKPOINTS = """\
source: "Demo zoo", or "Hugging Face Hub" for checkpoints of one's own choice.
zoo_models: of the zoo: shapes, digits, textures, signs.
typed: from the Hub: org/name per line, with @revision and a task's label= in front if need be.
base: the checkpoints' common base; empty to find it through their model cards.
"""
"""What `Chooser.inputs` are, for the docstrings of the endpoints that have them."""


@dataclass(frozen=True)
class Chooser:
    """The inputs that other tabs read."""

    source: gr.Radio
    names: gr.CheckboxGroup
    typed: gr.Textbox
    base: gr.Textbox
    overview: gr.HTML

    @property
    def inputs(self) -> list[Any]:
        """In the order of `Session.selection`."""
        return [self.source, self.names, self.typed, self.base]


def build_chooser(session: Session) -> Chooser:
    """Lay it out and wire it."""
    tasks = list(ZOO_TASKS)
    with gr.Group(elem_classes="ep-chooser"):
        with gr.Row(elem_classes="ep-tight"):
            source = gr.Radio([ZOO, TYPED], value=ZOO, label="Checkpoints from", min_width=220, scale=1)
            names = gr.CheckboxGroup(
                tasks, value=tasks, label="Models of the zoo, each tuned on one task", min_width=260, scale=2
            )
        with gr.Column(visible=False, elem_classes="ep-typed") as typed_part:
            typed = gr.Textbox(
                "",
                label="Checkpoints, one per line",
                info="org/name, with @revision and a label= in front if you like; the label names the task. "
                + ("Public repos only." if session.settings.on_space else "Folders work, too."),
                lines=3,
                placeholder=PLACEHOLDER,
            )
            with gr.Row(elem_classes="ep-tight"):
                base = gr.Textbox("", label="Base", placeholder="inferred from the model cards", scale=3, min_width=180)
                look = gr.Button("Look up", scale=1, min_width=120, elem_classes="ep-look")
        overview = gr.HTML(zoo_strip(session), elem_classes="ep-found")

    def switch(chosen: str) -> tuple[Any, Any, str]:
        from_zoo = chosen == ZOO
        return gr.update(visible=from_zoo), gr.update(visible=not from_zoo), zoo_strip(session) if from_zoo else ""

    @described(CHECKPOINTS=CHECKPOINTS)
    def look_up(source: str, zoo_models: list[str], typed: str, base: str) -> str:
        """Look checkpoints up before a merge: their commits, tasks, base and size. Nothing large is downloaded.

        Args:
            CHECKPOINTS

        Returns:
            A table as HTML, or what is wrong, in a sentence.
        """
        try:
            plan = jobs.wait_for("look_up", session.selection(source, zoo_models, typed, base), seconds=LOOK_SECONDS)
        except (EpimerError, jobs.JobError) as error:
            return charts.notice(jobs.as_sentence(error), "bad")
        return found_table(plan)

    source.change(
        switch, source, [names, typed_part, overview], queue=False, show_progress="hidden", api_visibility="private"
    )
    gr.on(
        [look.click, base.submit],
        look_up,
        [source, names, typed, base],
        overview,
        api_name="look_up",
        concurrency_limit=2,
        show_progress="minimal",
    )
    return Chooser(source, names, typed, base, overview)


def zoo_strip(session: Session) -> str:
    """What the zoo's models were tuned on: a few pictures and two numbers each."""
    cards = []
    for name, accuracy in session.zoo.accuracies.items():
        pictures = "".join(
            f"<img src='{as_data_url(picture)}' alt='{escape(label)}' title='{escape(label)}'>"
            for picture, label in session.zoo.pictures(name)
        )
        cards.append(
            f"<div class='ep-card'><h4>{escape(name)}</h4><div class='ep-thumbs'>{pictures}</div>"
            f"<p><b>{100 * accuracy['fine_tuned']:.0f}%</b> right; the base alone {100 * accuracy['zero_shot']:.0f}%"
            "</p></div>"
        )
    if not cards:
        return ""
    base = "<p class='ep-quiet'>Common base: the zoo's own tiny CLIP, trained on simple drawings.</p>"
    return f"<div class='ep-cards ep-zoo'>{''.join(cards)}</div>{base}"


def found_table(plan: dict[str, Any]) -> str:
    """Checkpoints that have been looked up: label, repo at its commit, task; the base and the size."""
    rows = "".join(
        f"<tr><th scope='row'>{escape(model['label'])}</th><td>{escape(model['name'])}"
        f"<small>{escape((model['commit'] or 'local')[:12])}</small></td>"
        f"<td>{escape(model['task'] or 'unknown')}</td></tr>"
        for model in plan["models"]
    )
    curvature = "there" if plan["statistics"] else "not there for all of them; it is estimated where a method needs it"
    notes = [f"Base: {plan['base']}", f"{plan['bytes'] / 1e6:,.0f} MB to read", f"Fisher information: {curvature}"]
    return (
        "<figure class='ep-figure'><table class='ep-table ep-left'><thead><tr><th>Label</th><th>Checkpoint</th>"
        f"<th>Task</th></tr></thead><tbody>{rows}</tbody></table>"
        f"<figcaption>{escape('; '.join(notes))}.</figcaption></figure>"
    )
