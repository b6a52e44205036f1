"""Writing safetensors: headers and places are known before the tensors are, which come in any order, whole or not.

Nothing is held: a tensor is on the disk when it has been written. Several processes may write tensors of the same
files, each its own.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hf_epimer.checkpoints.reader import COUNTERS, FORMATS, WEIGHTS, index_of
from hf_epimer.types import Shape

MAX_SHARD_BYTES = 5 * 10**9

Layout = Mapping[str, tuple[torch.dtype, Shape]]
"""Name -> type and shape of everything that a file or a set of shards will hold, in its order there."""


def write_tensors(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Stream tensors into `folder` as one safetensors file, or as shards with an index.

    Args:
        shapes: canonical name -> shape of everything that will come.
        tensors: (name, tensor), each once.

    Returns:
        The names of the files written.
    """
    with Shards(folder, {name: (dtype, shape) for name, shape in shapes.items()}, max_shard_bytes) as shards:
        shards.create()
        for name, tensor in tensors:
            shards.write(name, tensor)
        shards.write_index()
    return shards.files


class Shards:
    """The safetensors files of one checkpoint, to be filled in any order.

    Args:
        layout: of all of them.
        weights: the name of the file where one is enough; shards are named after it.

    Attributes:
        files: their names, with that of the index if there is one.
    """

    def __init__(
        self, folder: Path, layout: Layout, max_shard_bytes: int = MAX_SHARD_BYTES, weights: str = WEIGHTS
    ) -> None:
        self._folder, self._layout, self._index = folder, layout, index_of(weights)
        self._groups: dict[str, list[str]] = {}
        groups = _consecutive_groups({name: _nbytes(*entry) for name, entry in layout.items()}, max_shard_bytes)
        stem, suffix = weights.rsplit(".", 1)
        for number, names in enumerate(groups, start=1):
            shard = f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}"
            self._groups[weights if len(groups) == 1 else shard] = names
        self.files = [*self._groups, *([self._index] if len(groups) > 1 else [])]
        self._headers = {file: _header({name: layout[name] for name in names}) for file, names in self._groups.items()}
        self._places: dict[str, tuple[str, int]] = {}
        for file, names in self._groups.items():
            place = len(self._headers[file])
            for name in names:
                self._places[name] = file, place
                place += _nbytes(*layout[name])
        self._missing = {name: math.prod(shape) for name, (_, shape) in layout.items()}
        self._opened: dict[str, BinaryIO] = {}

    def create(self) -> None:
        """Make the files with their headers, in their final size."""
        for file, names in self._groups.items():
            with open(self._folder / file, "wb") as created:
                created.write(self._headers[file])
                created.truncate(created.tell() + sum(_nbytes(*self._layout[name]) for name in names))

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Write a tensor, or a piece of it, in the type that the layout says.

        Args:
            values: of any shape; the elements from `start` on in the order of the tensor's memory.
        """
        dtype, shape = self._layout[name]
        assert start + values.numel() <= math.prod(shape), name
        file, place = self._places[name]
        if file not in self._opened:
            self._opened[file] = open(self._folder / file, "r+b")  # noqa: SIM115  (closed with all of them)
        raw = values.to(dtype).contiguous().flatten().view(torch.uint8)
        self._opened[file].seek(place + start * dtype.itemsize)
        self._opened[file].write(raw.numpy().data)
        self._missing[name] -= values.numel()

    def write_index(self, written_elsewhere: Iterable[str] = ()) -> None:
        """Write the index of several shards, once all tensors have been written.

        Args:
            written_elsewhere: names of those that other processes have written.
        """
        missing = {name for name, count in self._missing.items() if count} - set(written_elsewhere)
        assert not missing, f"{sorted(missing)[0]} was not written"
        if len(self._groups) == 1:
            return
        total = sum(_nbytes(*entry) for entry in self._layout.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in self._groups.items() for name in names},
        }
        (self._folder / self._index).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._opened.values():
            with file:
                if error is None:
                    file.flush()
                    os.fsync(file.fileno())


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file: indented, UTF-8, with null for NaN and Infinity, which JSON does not have."""
    text = json.dumps(strict_json(content), indent=2, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


def strict_json(content: Any) -> Any:
    """NaN and Infinity as None, everywhere in dicts, lists and tuples."""
    if isinstance(content, dict):
        return {key: strict_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [strict_json(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _consecutive_groups(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut wherever a group would outgrow the limit: tensors arrive in this order and are not kept."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _nbytes(dtype: torch.dtype, shape: Shape) -> int:
    return math.prod(shape) * dtype.itemsize


def _header(layout: Layout) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in layout.items():
        size = _nbytes(dtype, shape)
        entries[name] = {
            "dtype": (FORMATS | COUNTERS)[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
