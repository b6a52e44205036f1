"""A button that starts heavy work, the one beside it that cancels, and the bar that says how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import charts
import gradio as gr
import jobs
from session import Session

from hf_epimer import EpimerError

HEAVY = "heavy"
"""The queue of merges, diagnoses and sweeps: one at a time."""


_TO_RESULT = """() => {
  const failed = document.querySelector('#%(what)s-status .ep-notice');
  if (innerWidth < 700 && !failed)
    document.getElementById('%(what)s-result').scrollIntoView({behavior: 'smooth', block: 'start'});
}"""
"""On a phone the result is below what was chosen."""


@dataclass(frozen=True)
class RunButton:
    """The two buttons and the place of the bar; `what` is the name of the work."""

    what: str
    go: gr.Button
    stop: gr.Button
    status: gr.HTML


def build_run_button(what: str, label: str) -> RunButton:
    """The buttons, side by side; Cancel appears when there is something to cancel."""
    with gr.Row(elem_classes="ep-start"):
        go = gr.Button(label, variant="primary", size="lg", elem_id=f"{what}-go", min_width=140)
        stop = gr.Button("Cancel", variant="stop", size="lg", visible=False, elem_id=f"{what}-stop", min_width=140)
    status = gr.HTML("", elem_id=f"{what}-status", elem_classes="ep-status")
    return RunButton(what, go, stop, status)


def wire(
    session: Session,
    button: RunButton,
    run: Callable[..., Iterator[tuple[Any, ...]]],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    named: Mapping[str, Any] | None = None,
) -> None:
    """Start `run`, one visitor at a time.

    Args:
        run: yields values for `outputs`.
        outputs: the first is the place of the bar.
        named: inputs that `run` gets by name.
    """
    quietly: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    status, buttons = outputs[0], [button.go, button.stop]

    def start(request: gr.Request) -> tuple[Any, ...]:
        text = session.take_ticket(request, button.what)
        return charts.progress_bar(0, text), gr.update(visible=False), gr.update(visible=True)

    def cancel(request: gr.Request) -> str:
        """End this session's work of this kind, queued or running; nothing is left behind."""
        session.cancel(request, button.what)
        return charts.progress_bar(0, "Cancelling")

    cancel.__name__ = f"cancel_{button.what}"  # what an agent reads

    def reset() -> tuple[Any, ...]:
        return gr.update(visible=True), gr.update(visible=False)

    started = button.go.click(start, None, [status, *buttons], api_visibility="private", **quietly)
    started.then(
        run,
        [*inputs],
        [*outputs],
        inputs_kwargs=dict(named or {}),
        api_name=button.what,
        concurrency_id=HEAVY,
        concurrency_limit=1,
        show_progress="hidden",
    ).then(reset, None, buttons, api_visibility="private", js=_TO_RESULT % {"what": button.what}, **quietly)
    button.stop.click(cancel, None, status, api_name=f"cancel_{button.what}", **quietly)


def steps(
    session: Session,
    request: gr.Request,
    what: str,
    places: int,
    function: str,
    arguments: Callable[[], tuple[Any, ...]],
    *,
    keep: bool = False,
) -> Iterator[tuple[tuple[Any, ...] | None, Any]]:
    """The events of a job as values for the page.

    Args:
        places: outputs beside the bar.
        function: in work.py.
        arguments: what it gets; an EpimerError in working them out is shown as if the job had failed.
        keep: as in `Session.work`.

    Yields:
        (values, None) while it runs or when it has failed, with {"error": ...} in the last place; (None, result) at
        the end.
    """
    try:
        chosen = arguments()
    except EpimerError as error:
        yield failed(jobs.as_sentence(error), places), None
        return
    for event in session.work(request, what, function, *chosen, keep=keep):
        if isinstance(event, jobs.Progress):
            yield (charts.progress_bar(event.share, event.text), *(gr.skip(),) * places), None
        elif isinstance(event, jobs.Failed):
            yield failed(event.message, places), None
        else:
            yield None, event.value


HINTS = {
    "--base": "Here the base goes into the box below the checkpoints.",
    "--task FILE": "Here, move the slider of test images to 0 to merge without measuring.",
    "--fisher": "Here, choose a method that needs none, such as TSV-M.",
}
"""Messages name the flags of the command; what that means on the page."""


def failed(message: str, places: int) -> tuple[Any, ...]:
    """Values for the page when there is no result; what was there before stays."""
    hints = " ".join(hint for flag, hint in HINTS.items() if flag in message)
    return (charts.notice(message, "bad", hints), *(gr.skip(),) * (places - 1), {"error": message})
