"""Temporary folders: one for all, in it one per visitor, which goes when the visitor does, or after a while."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

KEEP_SECONDS = 2 * 3600
"""For how long a visitor's results are kept if nobody says goodbye; the page's own cache of files follows it."""


class Workspace:
    """Where results lie until they are downloaded or pushed.

    The folder is also the one gradio serves and caches files in, so a result is on the disk once and everything goes at
    the end. To be made before gradio is imported.
    """

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="hf-epimer-web-"))
        os.environ["GRADIO_TEMP_DIR"] = str(self.root)
        self._folders: dict[str, Path] = {}
        self._lock = threading.Lock()

    @property
    def shared(self) -> Path:
        """For what all visitors may use: accuracies that have been measured, the merge that is shown at first."""
        folder = self.root / "shared"
        folder.mkdir(exist_ok=True)
        return folder

    def fresh(self, visitor: str, name: str) -> Path:
        """A new, empty folder of a visitor; also the moment when what visitors of long ago left is removed."""
        self._sweep()
        with self._lock:
            home = self._folders.get(visitor)
            if home is None or not home.is_dir():
                home = self._folders[visitor] = Path(tempfile.mkdtemp(prefix="visitor-", dir=self.root))
        os.utime(home)
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=home))

    def keep(self, folder: Path) -> None:
        """A fresh folder takes the place of older ones of the same visitor and name."""
        name = folder.name.rsplit("-", 1)[0]
        for other in folder.parent.glob(f"{name}-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def discard(self, folder: Path) -> None:
        """A fresh folder that nothing came of goes again, and the visitor's with it if it was the only one."""
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()

    def leave(self, visitor: str) -> None:
        """Remove everything of one visitor."""
        with self._lock:
            folder = self._folders.pop(visitor, None)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _sweep(self) -> None:
        with self._lock:
            known = list(self._folders.items())
        for visitor, folder in known:
            if not folder.exists() or time.time() - folder.stat().st_mtime > KEEP_SECONDS:
                self.leave(visitor)


def make_room(needed: float) -> None:
    """Empty the caches of models and data sets when there is less space on their disk than one visitor may ask for.

    They are caches: what is needed again is downloaded again. The demo zoo is beside them and stays.

    Args:
        needed: bytes.
    """
    from huggingface_hub import constants

    home = Path(constants.HF_HOME)
    if home.is_dir() and shutil.disk_usage(home).free < needed:
        for cache in ("hub", "datasets"):
            shutil.rmtree(home / cache, ignore_errors=True)
