"""Writing a result: one tensor at a time, and all or nothing.

The header of a safetensors file holds all names, shapes and offsets, so it can be written before the tensors are known;
they are then streamed behind it and never held together. A folder is built as a temporary sibling and renamed at the
end: under its own name it is complete or not there.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from hf_epimer.checkpoints import FORMATS, WEIGHTS, WEIGHTS_INDEX, Shape
from hf_epimer.errors import OutputError

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


def check_target(folder: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a folder that cannot become the result, before any work.

    Args:
        inputs: local files and folders the merge reads; overwriting may not take them away.

    Raises:
        OutputError: it is a file, a non-empty folder without `overwrite`, holds an input or the working directory, or
            its parent cannot be written to.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--out {folder} is a file, not a folder")
    for kept in (Path.cwd(), *inputs):
        if folder.exists() and Path(os.path.realpath(kept)).is_relative_to(folder) and any(folder.iterdir()):
            raise OutputError(f"--out {folder} holds {kept}, which would be lost: choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(f"--out {folder} exists and is not empty: choose another folder or add --overwrite")
    parent = folder.absolute().parent
    existing = next(path for path in (parent, *parent.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        raise OutputError(f"--out {folder}: cannot write to {existing}")


@contextlib.contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends well and disappears when it does not.

    What a killed process left behind is removed by the next run.

    Raises:
        OutputError: the disk is full, the folder cannot be written, or something else has meanwhile been put there.
    """
    target = Path(os.path.realpath(target))
    partial = target.parent / f".{target.name}.partial-{os.getpid()}.{secrets.token_hex(3)}"
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        partial.mkdir()
        yield partial
        _install(partial, target, overwrite)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in missing:  # only empty folders go, from the innermost outwards
                parent.rmdir()


def _install(partial: Path, target: Path, overwrite: bool) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        os.replace(partial, target)
        return
    if not overwrite:
        raise OutputError(f"{target} was filled by something else during the merge; merge again to another folder")
    replaced = partial.with_name(partial.name + ".old")
    os.replace(target, replaced)
    os.replace(partial, target)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    for path in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        process = path.name.rsplit("partial-", 1)[1].split(".")[0]
        if process.isdigit() and not _alive(int(process)):
            if path.name.endswith(".old") and not target.exists():
                os.replace(path, target)  # killed between the two renames of an overwrite: the old result comes back
            else:
                shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_text(file: Path, text: str) -> None:
    """Write a text file whole: it appears under its name, or changes, only when all of it is on the disk.

    Raises:
        OutputError: it cannot be written.
    """
    with atomic_file(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends well and disappears when it does not.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to.
    """
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {target}: {reason}; nothing was left there") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
