"""`hf-epimer demo --web`: the page of the Hugging Face Space, on this machine, with the demo zoo."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from hf_epimer.errors import UsageError


def app_file() -> Path:
    """The program of the page: inside of the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    places = [package / "spaces_app" / "app.py", package.parent / "spaces_app" / "app.py"]
    return next(place for place in places if place.is_file())


def serve() -> None:
    """Run the page as a Space does, `python app.py`, until it is stopped.

    Raises:
        UsageError: gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise UsageError("the page needs gradio: pip install 'hf-epimer[space]'")
    file = app_file()
    sys.path.insert(0, str(file.parent))
    runpy.run_path(str(file), run_name="__main__")
