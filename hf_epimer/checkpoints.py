"""Checkpoint files: a lazy reader of (sharded) safetensors and an atomic writer. Files only, no Hub, no model class.

Everything that has one tensor per parameter is a checkpoint: base, fine-tuned models, Fisher diagonals, Gram matrices.
The reader maps files into memory, so that a tensor costs no anonymous memory until it is copied; the writer streams one
tensor at a time into a file whose header, with all shapes and offsets, is known beforehand.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_epimer.errors import CheckpointError, NotFoundError, OutputError

Shape = tuple[int, ...]

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
FISHER = "fisher.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
MAX_SHARD_BYTES = 5 * 10**9

_FORMATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


class TensorSource(Protocol):
    """Anything with one tensor per canonical name."""

    label: str

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Canonical name -> shape."""

    def tensor(self, name: str) -> Tensor:
        """The tensor, in whatever dtype it is stored."""

    def copy_to(self, name: str, out: Tensor) -> None:
        """Copy the tensor to `out`, converting to its dtype."""


class StateDict:
    """A `TensorSource` over tensors in memory."""

    def __init__(self, label: str, tensors: Mapping[str, Tensor]) -> None:
        self.label = label
        self._tensors = tensors
        self.shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def copy_to(self, name: str, out: Tensor) -> None:
        out.copy_(self.tensor(name))


class Checkpoint:
    """A lazy `TensorSource` over safetensors files.

    Args:
        label: how messages name it.
        files: one file, or all shards.
        canonical: maps a stored name to a canonical one; None drops the tensor.

    Raises:
        CheckpointError: a file is truncated or corrupt, or two tensors have the same canonical name.
    """

    def __init__(
        self, label: str, files: Iterable[Path], canonical: Callable[[str], str | None] = lambda name: name
    ) -> None:
        self.label = label
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, tuple[Any, str, Path]] = {}
        self._descriptors: dict[Path, _Descriptor] = {}
        self._opening = threading.Lock()
        for file in files:
            with _readable(label, file):
                handle = safe_open(file, framework="pt")
                self.metadata.update(handle.metadata() or {})
                for stored in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                    name = canonical(stored)
                    if name is None:
                        continue
                    if name in self._places:
                        raise CheckpointError(f"{label}: {file.name} holds {name} twice, under different prefixes")
                    piece = handle.get_slice(stored)
                    self.shapes[name] = tuple(piece.get_shape())
                    self.dtypes[name] = piece.get_dtype()
                    self._places[name] = (handle, stored, file)

    def tensor(self, name: str) -> Tensor:
        handle, stored, file = self._places[name]
        with _readable(self.label, file):
            tensor: Tensor = handle.get_tensor(stored)
        return tensor

    def copy_to(self, name: str, out: Tensor) -> None:
        _, stored, file = self._places[name]
        if self.dtypes[name] != _FORMATS.get(out.dtype) or not out.is_contiguous() or out.device.type != "cpu":
            out.copy_(self.tensor(name))
            return
        with _readable(self.label, file):
            self._descriptor(file).read(stored, out.flatten().view(torch.uint8).numpy().data)

    def read_ahead(self, name: str) -> None:
        """Ask the system to bring a tensor from the disk while something else is computed; returns at once."""
        _, stored, file = self._places[name]
        with _readable(self.label, file):
            self._descriptor(file).will_need(stored)

    def _descriptor(self, file: Path) -> _Descriptor:
        with self._opening:
            if file not in self._descriptors:
                self._descriptors[file] = _Descriptor(file)
            return self._descriptors[file]

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_numel(shape) * _WIDTHS[self.dtypes[name]] for name, shape in self.shapes.items())


class _Descriptor:
    """An open safetensors file and where its tensors lie.

    Reading into a buffer that is used again and again is twice as fast as copying from a mapped file, whose every page
    the system has to map first, and threads that do so wait for each other.
    """

    def __init__(self, path: Path) -> None:
        self.file = open(path, "rb")  # noqa: SIM115  (lives as long as the checkpoint)
        length = struct.unpack("<Q", self.file.read(8))[0]
        header = json.loads(self.file.read(length))
        self.places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        self.start = 8 + length

    def read(self, name: str, target: memoryview) -> None:
        """Fill `target` with the tensor's bytes; safe to call from several threads."""
        begin, _ = self.places[name]
        done = 0
        while done < len(target):
            count = os.preadv(self.file.fileno(), [target[done:]], self.start + begin + done)
            if count == 0:
                raise OSError(f"{name} ends early")
            done += count

    def will_need(self, name: str) -> None:
        if hasattr(os, "posix_fadvise"):  # not on macOS, whose own read-ahead has to do
            begin, end = self.places[name]
            os.posix_fadvise(self.file.fileno(), self.start + begin, end - begin, os.POSIX_FADV_WILLNEED)


_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def _numel(shape: Shape) -> int:
    return int(torch.Size(shape).numel())


@contextlib.contextmanager
def _readable(label: str, file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{label}: {file} is not a readable safetensors file ({error}): it is truncated or corrupt, fetch it again"
        ) from error


def weight_files(folder: Path, label: str) -> list[Path]:
    """The safetensors file or shards of a checkpoint folder.

    Raises:
        NotFoundError: the folder does not exist.
        CheckpointError: there are only pickled weights, none at all, or a shard named by the index is missing.
    """
    if not folder.is_dir():
        raise NotFoundError(f"{label}: folder {folder} does not exist")
    names = {path.name for path in folder.iterdir()}
    wanted = choose_weights(names, label, lambda: (folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))
    missing = [name for name in wanted if name not in names]
    if missing:
        raise CheckpointError(f"{label}: shard {missing[0]} named by {WEIGHTS_INDEX} is missing")
    return [folder / name for name in wanted]


def choose_weights(names: Iterable[str], label: str, read_index: Callable[[], str]) -> list[str]:
    """Which files of a checkpoint hold its weights, given the names of all its files."""
    names = set(names)
    if WEIGHTS in names:
        return [WEIGHTS]
    if WEIGHTS_INDEX in names:
        try:
            return sorted(set(json.loads(read_index())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{label}: {WEIGHTS_INDEX} is not a safetensors index ({error})") from error
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if pickled:
        raise CheckpointError(
            f"{label}: only pickled weights ({', '.join(pickled)}), which can run code and are never opened. Convert "
            "them where you trust them: CLIPVisionModel.from_pretrained(...).save_pretrained(folder)"
        )
    raise CheckpointError(f"{label}: no {WEIGHTS} (or {WEIGHTS_INDEX}) among its files")


def read_json(file: Path, label: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{label}: {file.name} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{label}: {file.name} is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{label}: {file.name} is not a JSON object")
    return content


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
    groups = _consecutive_groups({n: _numel(shape) * dtype.itemsize for n, shape in shapes.items()}, max_shard_bytes)
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
        total = sum(_numel(shape) * dtype.itemsize for shape in shapes.values())
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
        size = _numel(shape) * dtype.itemsize
        entries[name] = {"dtype": _FORMATS[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that cannot become the result, before any work.

    Raises:
        OutputError: it is a file, a non-empty folder without `overwrite`, or its parent cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--out {folder} is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(f"--out {folder} exists and is not empty: choose another folder or add --overwrite")
    parent = folder.absolute().parent
    existing = next(path for path in (parent, *parent.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        raise OutputError(f"--out {folder}: cannot write to {existing}")


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends well and disappears when it does not.

    SIGTERM inside the block counts as an interruption. What a SIGKILL left behind is removed by the next run.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    target = target.absolute()
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        partial.mkdir()
        with _interruptible():
            yield partial
            _install(partial, target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _install(partial: Path, target: Path) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        os.replace(partial, target)
        return
    replaced = partial.with_name(partial.name + ".old")
    os.replace(target, replaced)
    os.replace(partial, target)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    for path in target.parent.glob(f".{target.name}.partial-*"):
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


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM unwind the stack like Ctrl-C does; outside the main thread signals are not ours to handle."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
