"""The page of hf_epimer: on a Hugging Face Space, or at home with `hf-epimer demo --web`.

    python app.py

Imports are within `main`: children are started from this file, too, and need nothing of the page.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from importlib.util import find_spec


def main() -> None:
    """Build the page and serve it until it is stopped."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads must not spin beside the page's
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from settings import Settings, forget_token, on_zero_gpu
    from workspace import Workspace

    settings = Settings.from_environment()
    workspace = Workspace()
    if settings.on_space:
        forget_token(workspace.root / "no-token")
    if on_zero_gpu():
        import zero_gpu as zero_gpu  # before the page, which may not start without a decorated function
    import jobs
    from page import LAYOUT, STYLE, build_page, theme
    from selection import Zoo
    from session import Session
    from zoo_maker import ZooMaker

    session = Session(settings, workspace, Zoo.here())
    maker = ZooMaker(session.zoo)
    page = build_page(session, maker)
    page.queue(max_size=20, default_concurrency_limit=4)
    page.launch(
        theme=theme(),
        css_paths=STYLE,
        head=LAYOUT,
        footer_links=["api"],
        max_file_size="20mb",
        show_error=True,
        ssr_mode=False,  # on a Space as everywhere else
        mcp_server=find_spec("mcp") is not None,  # the endpoints as tools; gradio alone has it not
        prevent_thread_lock=True,
    )
    jobs.warm_up()  # only now, so that the page is there first
    maker.start()
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
    jobs.end_all()
    workspace.remove()


if __name__ == "__main__":
    main()
