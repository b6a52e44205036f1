"""A picture and what the models see in it: the base, every fine-tuned model, and the merge, side by side."""

from __future__ import annotations

import io
from dataclasses import replace
from html import escape
from typing import Any

import charts
import gradio as gr
import jobs
from chooser import CHECKPOINTS, Chooser
from PIL import Image
from selection import ZOO
from session import Session
from tools import described

from hf_epimer import ZOO_TASKS, EpimerError

OWN = "my own classes"
MOST_CLASSES = 100

WELCOME = (
    "<div class='ep-welcome'><h3>What do they see?</h3><p>Choose one of the pictures, or bring your own. Each model "
    "was fine-tuned on one task only; the merge should know all of them.</p></div>"
)


def build_try_tab(session: Session, chooser: Chooser, merged: gr.State) -> gr.Gallery:
    """Lay it out and wire it; the gallery is to be filled when the zoo is there."""
    with gr.Row(elem_classes="ep-columns"):
        with gr.Column(scale=4, min_width=300):
            gr.HTML("<p class='ep-quiet'>Test pictures of the zoo: choose one.</p>")
            gallery = gr.Gallery(
                gallery_pictures(session),
                show_label=False,
                columns=6,
                height="auto",
                object_fit="cover",
                allow_preview=False,
                interactive=False,
                elem_classes="ep-gallery",
                elem_id="try-gallery",
                buttons=[],
            )
            image = gr.Image(
                type="pil", label="Picture", sources=["upload", "clipboard"], height=220, elem_id="try-image"
            )
            task = gr.Dropdown([*ZOO_TASKS, OWN], value=ZOO_TASKS[0], label="Task")
            classes = gr.Textbox("", label="Class names", placeholder="cat, dog, truck", visible=False)
            go = gr.Button("Classify", variant="primary", elem_id="try-go")
        with gr.Column(scale=7, min_width=300, elem_classes="ep-result"):
            result = gr.HTML(WELCOME, elem_id="try-result")
            with gr.Accordion("All numbers", open=False):
                numbers = gr.JSON(show_label=False)
    truth = gr.State("")

    @described(CHECKPOINTS=CHECKPOINTS)
    def classify(
        source: str,
        zoo_models: list[str],
        typed: str,
        base: str,
        image: Image.Image | None,
        task: str,
        classes: str,
        merged: dict[str, Any] | None,
        truth: str,
    ) -> tuple[Any, ...]:
        """Classify a picture by the base, every fine-tuned model and the merge of this session, side by side.

        Args:
            CHECKPOINTS
            image: the picture.
            task: whose classes to choose from, such as digits, or "my own classes".
            classes: one's own, with commas between them.

        Returns:
            Cards as HTML, and all probabilities; {"error": a sentence} if it failed.
        """
        try:
            if image is None:
                raise EpimerError("choose a picture first, or bring your own")
            names = _own_classes(classes) if task == OWN else []
            if not names and task not in _tasks_of(merged):  # never a file of this machine
                raise EpimerError(f"there is no task {task!r} here: choose one of the list, or give your own classes")
            if merged:
                selection, folder = merged["selection"], merged["folder"]
            else:
                if source != ZOO:
                    raise EpimerError("merge these checkpoints first, in the first tab; then try them here")
                selection, folder = session.selection(source, zoo_models, typed, base), None
            asked = "" if names else str(session.zoo.task_file(task)) if task in ZOO_TASKS else task
            selection = replace(selection, largest=session.settings.bytes)
            arguments = (selection, folder, image, asked, names, str(session.workspace.shared))
            guesses = jobs.wait_for("classify", *arguments, seconds=session.settings.seconds)
        except (EpimerError, jobs.JobError) as error:
            message = jobs.as_sentence(error)
            return charts.notice(message, "bad"), {"error": message}
        rows = [(row["name"], row["classes"]) for row in guesses["rows"]]
        return _shown(rows, task, truth), guesses

    def pick(event: gr.SelectData) -> tuple[Any, ...]:
        """A picture of the gallery, with its task and what it shows."""
        task, index = _places(session)[event.index]
        picture, label = session.zoo.pictures(task)[index]
        return Image.open(io.BytesIO(picture)), task, label

    inputs = [*chooser.inputs, image, task, classes, merged, truth]
    outputs = [result, numbers]
    quietly: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    go.click(classify, inputs, outputs, api_name="classify", concurrency_limit=2, show_progress="minimal")
    gallery.select(pick, None, [image, task, truth], **quietly).then(
        classify, inputs, outputs, api_visibility="private", concurrency_limit=2, show_progress="minimal"
    )
    image.input(lambda: "", None, truth, **quietly)
    task.change(lambda name: gr.update(visible=name == OWN), task, classes, **quietly)
    merged.change(lambda merge: gr.update(choices=[*_tasks_of(merge), OWN]), merged, task, **quietly)
    return gallery


def gallery_pictures(session: Session) -> list[Image.Image]:
    """Pictures of every task of the zoo, as the gallery shows them."""
    return [Image.open(io.BytesIO(session.zoo.pictures(task)[index][0])) for task, index in _places(session)]


def _places(session: Session) -> list[tuple[str, int]]:
    return [
        (task, index) for task in session.zoo.accuracies for index in range(min(6, len(session.zoo.pictures(task))))
    ]


def _tasks_of(merged: dict[str, Any] | None) -> list[str]:
    tasks = [model["task"] for model in merged["models"] if model["task"]] if merged else []
    return list(dict.fromkeys([*tasks, *ZOO_TASKS]))


def _own_classes(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.replace("\n", ",").split(",") if name.strip()))
    if len(names) < 2:
        raise EpimerError("give at least two class names, with commas between them")
    if len(names) > MOST_CLASSES:
        raise EpimerError(f"at most {MOST_CLASSES} class names, not {len(names)}")
    return names


def _shown(rows: list[tuple[str, dict[str, float]]], task: str, truth: str) -> str:
    known = [classes for _, classes in rows]
    right = truth if known and truth in known[0] else ""
    said = f"It shows: <b>{escape(right)}</b>. " if right else ""
    about = f"<p class='ep-quiet'>{said}The three most probable of {len(known[0])} classes of {escape(task)}.</p>"
    return charts.guesses(rows, "merged", right) + about
