"""Pushing a merge to the visitor's own account.

On a Space with the token of the visitor's sign-in, which is handed to the one child that pushes and kept nowhere; at
home with the token that `hf auth login` or HF_TOKEN has put there, which this process never looks at.
"""

from __future__ import annotations

from typing import Any

import charts
import gradio as gr
import jobs
from session import Session

SECONDS = 1800
"""For a push: large files on a slow line."""

PUSH = """Push the merge of this session to the Hub, in one commit with its card; on a Space after signing in.

Args:
    repo: your-name/model.
    private: create the repo private.

Returns:
    Where it is, or what is wrong, as HTML.
"""


def build_push_box(session: Session, merged: gr.State) -> None:
    """Lay it out and wire it."""
    on_space = session.settings.on_space
    if on_space:
        gr.Markdown(
            "Sign in, and the merge goes to a repo of yours in one commit, with its card. Nothing is stored here."
        )
        gr.LoginButton(size="md")
    else:
        gr.Markdown(
            "It goes to a repo of yours in one commit, with its card. First `hf auth login`, or set `HF_TOKEN`; or "
            "download it, and push it later with `hf-epimer push DIR ORG/NAME`."
        )
    with gr.Row(elem_classes="ep-tight"):
        repo = gr.Textbox("", label="Repo", placeholder="your-name/merged", scale=3, min_width=180)
        private = gr.Checkbox(label="Private", scale=1, min_width=90)
        go = gr.Button("Push", scale=1, min_width=100, elem_id="push-go")
    status = gr.HTML("", elem_id="push-status")

    def push_here(repo: str, private: bool, merged: dict[str, Any] | None) -> str:
        return _push(merged, repo, private, None)

    def push_signed_in(repo: str, private: bool, merged: dict[str, Any] | None, token: gr.OAuthToken | None) -> str:
        if token is None:
            return charts.notice("Sign in with Hugging Face first: the button is above.", "bad")
        return _push(merged, repo, private, token.token)

    push = push_signed_in if on_space else push_here
    push.__name__, push.__doc__ = "push", PUSH  # what an agent reads

    if on_space:  # without triggers: when the page is opened
        gr.on(None, suggest_repo, None, repo, api_visibility="private", queue=False, show_progress="hidden")
    gr.on(
        [go.click, repo.submit],
        push,
        [repo, private, merged],
        status,
        api_name="push",
        concurrency_limit=2,
        show_progress="minimal",
    )


def suggest_repo(profile: gr.OAuthProfile | None) -> Any:
    """A name for the repo of who is signed in."""
    return f"{profile.username}/merged" if profile else gr.skip()


def _push(merged: dict[str, Any] | None, repo: str, private: bool, token: str | None) -> str:
    if not merged:
        return charts.notice("Merge something first.", "bad")
    try:
        url = jobs.wait_for("push", merged["folder"], repo.strip(), private, token, seconds=SECONDS)
    except jobs.JobError as error:
        reason, again, _ = str(error).partition("; the merged folder is complete")  # and where it lies, here
        elsewhere = "The merge is complete: download it, and push it from your machine with hf-epimer push."
        return charts.notice(reason, "bad", elsewhere if again else "")
    return charts.notice(f"Pushed to {repo.strip()}.", "good", url)
