"""What comes from outside: paths as people type them, and text that strangers wrote, read within bounds.

The folder or repo of somebody else may hold a pipe that nobody writes to, a gigabyte of JSON, brackets nested a hundred
thousand deep, or YAML whose anchors double with every line. Everything that is small by its nature is read here.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from hf_epimer.errors import UsageError

LARGEST = 4 * 2**20
"""Bytes of a text that is small by its nature: a config, a card, a task file."""


LARGEST_LISTING = 16 * 2**20
"""Bytes of a list of tensors, a safetensors header or an index of shards: a hundred thousand names fit in."""


class Unreadable(ValueError):
    """Why a file or text cannot be used; whoever asked for it adds its name."""


def expanded(path: str | Path) -> Path:
    """A path as it was typed, with `~` and `~user` resolved, which shells leave alone behind an equals sign.

    Raises:
        UsageError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path}: there is no such user's home folder") from error


def exists(path: Path) -> bool:
    """Whether something is there; a name that no file can have is nothing."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def leads_elsewhere(file: Path) -> bool:
    """Whether a file is a link out of its folder. Those of the Hub's cache lead to its own `blobs`, and are not."""
    folder = Path(os.path.realpath(file.parent))
    snapshots = (place.parent for place in (folder, *folder.parents) if place.parent.name == "snapshots")
    places = [folder, *(place.parent / "blobs" for place in snapshots)]
    return not any(Path(os.path.realpath(file)).is_relative_to(place) for place in places)


def open_file(file: Path) -> BinaryIO:
    """A file to read bytes from.

    Raises:
        Unreadable: it is a pipe or device, which may never end.
        OSError: it is not there, or may not be read.
    """
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # to open a pipe must not wait
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unreadable("it is no ordinary file")
    return os.fdopen(descriptor, "rb")


def read_text(file: Path, largest: int = LARGEST) -> str:
    """All of a UTF-8 text file.

    Raises:
        Unreadable: it is a pipe or device, larger than `largest` bytes, or no text.
        OSError: it is not there, or may not be read.
    """
    with open_file(file) as opened:
        content = opened.read(largest + 1)
    if len(content) > largest:
        raise Unreadable(f"it is larger than {largest / 2**20:.0f} MiB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable("it is no UTF-8 text") from error


def parse_json(text: str) -> Any:
    """A JSON document.

    Raises:
        Unreadable: it is none, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise Unreadable("it is nested too deeply") from error
    except ValueError as error:
        raise Unreadable(f"it is not valid JSON: {error}") from error


def parse_yaml(text: str) -> Any:
    """A YAML document of plain values.

    Aliases are refused: each may stand for all of the document so far, so that a few lines hold more than any memory.

    Raises:
        Unreadable: it is none, has aliases, or is nested too deeply to be read.
    """
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise Unreadable("it uses YAML aliases (*name): write the values out")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Plain)
    except Unreadable:
        raise
    except RecursionError as error:
        raise Unreadable("it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise Unreadable(f"it is not valid YAML: {' '.join(str(error).split())}") from error
