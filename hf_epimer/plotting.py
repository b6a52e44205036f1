"""What all pictures have in common: colours that everyone can tell apart, figures, PNG files that are known again.

matplotlib is an extra (`pip install 'hf-epimer[plots]'`) and imported where it is used. Figures are made without
pyplot, so that no window system and no state of the process is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hf_epimer.errors import OutputError
from hf_epimer.outside import Unreadable, exists, open_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "the pictures need matplotlib: pip install 'hf-epimer[plots]'"

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")
"""Okabe and Ito's palette, told apart with every common kind of colour vision; grey for yellow, faint on white."""

MARKERS = "osD^vPX*"
DPI = 150

SOFTWARE = "hf-epimer"
"""Noted in every picture, so that it is known again."""


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def require() -> None:
    """Find out before any work whether pictures can be drawn.

    Raises:
        OutputError: matplotlib is missing; the message says how to get it.
    """
    if not available():
        raise OutputError(MISSING)


def save(figures: Mapping[str, Figure], folder: Path) -> list[str]:
    """Write figures as PNG; the names of the files."""
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=DPI, metadata={"Software": SOFTWARE})
    return list(figures)


def check_replaceable(picture: Path) -> None:
    """Refuse to draw over a picture that is not one of ours.

    Raises:
        OutputError: naming it.
    """
    from PIL import Image, UnidentifiedImageError

    if not exists(picture):
        return
    try:
        with open_file(picture) as file, Image.open(file) as image:
            is_ours = image.info.get("Software") == SOFTWARE
    except (OSError, Unreadable, UnidentifiedImageError):
        is_ours = False
    if not is_ours:
        raise OutputError(f"{picture} exists and was not drawn by hf-epimer: choose another folder")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to no window system, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes) -> None:
    """Leave the two spines that carry ticks."""
    axes.spines[["top", "right"]].set_visible(False)
