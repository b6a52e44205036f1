"""The whole page: header, checkpoints, four tabs; the demo zoo is made in the background where it is not there yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from chooser import build_chooser, zoo_strip
from diagnosis_tab import build_diagnosis_tab
from merge_tab import build_merge_tab
from selection import ZOO
from session import Session
from sweep_tab import build_sweep_tab
from try_tab import build_try_tab, gallery_pictures
from zoo_maker import ZooMaker

HEAD = (
    "<header class='ep-header'><div class='ep-mark' aria-hidden='true'><svg viewBox='0 0 48 48'>"
    "<path d='M5 9 C20 9 20 24 34 24'/><path d='M5 24 H34'/><path d='M5 39 C20 39 20 24 34 24'/>"
    "<circle cx='38' cy='24' r='6'/></svg></div><div><h1>EpiMer</h1>"
    "<p>Merge fine-tuned CLIP vision models into one, without training.</p></div></header>"
)

LAYOUT = (
    "<style>.gradio-container .main.app { max-width: 1180px; } @media (max-width: 640px) "
    "{ .gradio-container .main.app { padding: .6rem .75rem; } } footer .divider { display: none; }</style>"
)
"""For what surrounds the page; gradio confines the style sheet to what is within."""

STYLE = Path(__file__).with_name("style.css")
SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def build_page(session: Session, maker: ZooMaker) -> gr.Blocks:
    """Everything, wired; to be launched with `theme()` and `STYLE`."""
    with gr.Blocks(title="EpiMer: merge CLIP models", delete_cache=(600, 7200), analytics_enabled=False) as page:
        gr.HTML(HEAD)
        banner = gr.HTML(maker.banner(), visible=not session.zoo.is_ready, elem_id="zoo-banner")
        clock = gr.Timer(1.0, active=not session.zoo.is_ready)
        chooser = build_chooser(session)
        with gr.Tabs():
            with gr.Tab("Merge"):
                merged = build_merge_tab(session, chooser)
            with gr.Tab("Try it"):
                gallery = build_try_tab(session, chooser, merged)
            with gr.Tab("Diagnosis"):
                build_diagnosis_tab(session, chooser)
            with gr.Tab("Sweep"):
                build_sweep_tab(session, chooser)
        if not session.zoo.is_ready:

            def look(source: str) -> tuple[Any, ...]:
                ready = session.zoo.is_ready
                news = gr.update(value=maker.banner(), visible=not ready), gr.Timer(active=not ready)
                if not ready:
                    return (*news, gr.skip(), gr.skip())
                return (*news, zoo_strip(session) if source == ZOO else gr.skip(), gallery_pictures(session))

            gr.on(
                [page.load, clock.tick],
                look,
                chooser.source,
                [banner, clock, chooser.overview, gallery],
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )
        page.unload(session.leave)
    return page


def theme() -> gr.themes.Base:
    """Quiet, with the fonts of the visitor's machine: nothing is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=SANS,
        font_mono=MONO,
    ).set(
        body_text_color_subdued="*neutral_500",  # the theme's own grey is too faint to read on white
        block_info_text_color="*neutral_500",
        block_title_text_weight="600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color_dark="*neutral_400",
    )
