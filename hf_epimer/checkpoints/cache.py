"""Our own small caches below HF_HOME: of heads, and of statistics.

What cannot be written there is kept in a temporary folder for as long as the process lasts.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hf_epimer.errors import OutputError

logger = logging.getLogger(__name__)


def cached_path(kind: str, name: str) -> Path:
    """Where a file of a cache is, or will be."""
    from huggingface_hub import constants  # with the first use of a cache: --help has none

    home = Path(constants.HF_HOME) / "hf-epimer" / kind / name
    if not os.path.isfile(home) and _spare_folder.cache_info().currsize:
        spare = _spare_folder() / kind / name
        if spare.is_file():
            return spare
    return home


def keep(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a file of a cache; where it lies then.

    Args:
        path: from `cached_path`.
        write: writes the file to the path that it is given, as a whole.

    Raises:
        OutputError: it can be written nowhere.
    """
    try:
        write(path)
    except OutputError as error:
        logger.warning("%s; it is kept for this run only (HF_HOME names another folder)", error)
        path = _spare_folder() / path.parent.name / path.name
        write(path)
    return path


def remove_spare() -> None:
    """Take away what was kept for this run only; the end of the interpreter does the same, unless it is cut short."""
    if _spare_folder.cache_info().currsize:
        shutil.rmtree(_spare_folder(), ignore_errors=True)
        _spare_folder.cache_clear()


@functools.cache
def _spare_folder() -> Path:
    atexit.register(remove_spare)
    return Path(tempfile.mkdtemp(prefix="hf-epimer-"))
