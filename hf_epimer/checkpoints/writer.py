"""Writing safetensors tensor by tensor: the header is known before the tensors are; they are never held together."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_epimer.checkpoints.reader import FORMATS, WEIGHTS, WEIGHTS_INDEX
from hf_epimer.types import Shape

MAX_SHARD_BYTES = 5 * 10**9


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
        tensors: (name, tensor) in the order of `shapes`.

    Returns:
        The names of the files written.
    """
    groups = _consecutive_groups({n: math.prod(shape) * dtype.itemsize for n, shape in shapes.items()}, max_shard_bytes)
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        filename = WEIGHTS if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(names, filename)
        with open(folder / filename, "wb") as file:
            file.write(_header({name: shapes[name] for name in names}, dtype))
            for name in names:
                arrived, tensor = next(stream)
                assert arrived == name and tuple(tensor.shape) == tuple(shapes[name])
                raw = tensor.to(dtype).contiguous().flatten().view(torch.uint8)
                file.write(raw.numpy().data)
            file.flush()
            os.fsync(file.fileno())
    written = sorted(set(weight_map.values()))
    if len(groups) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        written.append(WEIGHTS_INDEX)
    return written


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


def _header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": FORMATS[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
