"""Folders as a merge leaves them, and what lies beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hf_epimer.checkpoints.folders import atomic_folder

RECORD = "merge_config.json"
RECIPE = {"method": "mean", "models": ["a"], "options": {}, "versions": {}}


def fill(folder: Path, text: str = "x") -> None:
    (folder / RECORD).write_text(json.dumps(RECIPE))
    (folder / "README.md").write_text(text)
    (folder / "model.safetensors").write_bytes(b"weights")


def result(folder: Path, text: str = "x") -> Path:
    """A folder as a merge leaves it."""
    with atomic_folder(folder, RECORD) as unfinished:
        fill(unfinished, text)
    return folder


def below(folder: Path) -> dict[str, str]:
    """Everything there is: path -> content, or where a link leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = path.read_bytes().hex()
    return found


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "partial" in path.name)
