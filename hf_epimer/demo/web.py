"""`hf-epimer demo --web`: the page of the Hugging Face Space, on this machine, with the demo zoo."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from hf_epimer.errors import UsageError

APP = Path(__file__).parents[2] / "spaces_app" / "app.py"
"""The program of the page: beside the package in a checkout, and installed beside it."""


def serve() -> None:
    """Run the page as a Space does, `python app.py`, until it is stopped.

    Raises:
        UsageError: gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise UsageError("the page needs gradio: pip install 'hf-epimer[space]'")
    sys.path.insert(0, str(APP.parent))
    runpy.run_path(str(APP), run_name="__main__")
