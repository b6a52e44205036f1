"""The whole page: header, checkpoints, four tabs; the demo zoo is made in the background where it is not there yet."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from chooser import build_chooser
from desk import Desk
from diagnosis_tab import build_diagnosis_tab
from merge_tab import build_merge_tab
from sweep_tab import build_sweep_tab
from try_tab import build_try_tab

HEAD = (
    "<header class='ep-header'><div class='ep-mark' aria-hidden='true'><svg viewBox='0 0 48 48'>"
    "<path d='M5 9 C20 9 20 24 34 24'/><path d='M5 24 H34'/><path d='M5 39 C20 39 20 24 34 24'/>"
    "<circle cx='38' cy='24' r='6'/></svg></div><div><h1>EpiMer</h1>"
    "<p>Merge fine-tuned CLIP vision models into one, without training.</p></div></header>"
)

STYLE = Path(__file__).with_name("style.css")
SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def build_page(desk: Desk) -> gr.Blocks:
    """Everything, wired; to be launched with `look()`."""
    with gr.Blocks(title="EpiMer: merge CLIP models", delete_cache=(600, 7200), analytics_enabled=False) as page:
        gr.HTML(HEAD)
        chooser = build_chooser(desk)
        with gr.Tabs():
            with gr.Tab("Merge"):
                merged = build_merge_tab(desk, chooser)
            with gr.Tab("Try it"):
                build_try_tab(desk, chooser, merged)
            with gr.Tab("Diagnosis"):
                build_diagnosis_tab(desk, chooser)
            with gr.Tab("Sweep"):
                build_sweep_tab(desk, chooser)
        page.unload(desk.leave)
    return page


def theme() -> gr.themes.Base:
    """Quiet, with the fonts of the visitor's machine: nothing is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=SANS,
        font_mono=MONO,
    )
