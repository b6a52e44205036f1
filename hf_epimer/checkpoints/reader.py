"""Checkpoint files: a lazy reader of (sharded) safetensors. Files only, no Hub, no model class.

Everything that has one tensor per parameter is a checkpoint: base, fine-tuned models, Fisher diagonals, Gram matrices.
Opening one reads headers only; a tensor is read when it is asked for, into a buffer that the caller owns.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_epimer.errors import CheckpointError
from hf_epimer.types import Shape

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
FISHER = "fisher.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")

FORMATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


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


@runtime_checkable
class TaskVectorSource(TensorSource, Protocol):
    """A source that knows its difference to the base better than a subtraction would: an adapter."""

    def task_vector_to(self, name: str, out: Tensor) -> None:
        """Write the tensor minus the base's to `out`."""


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
        as_stored = self.dtypes[name] == FORMATS.get(out.dtype) and out.is_contiguous() and out.device.type == "cpu"
        if not as_stored or not hasattr(os, "preadv"):
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
        return sum(math.prod(shape) * _WIDTHS[self.dtypes[name]] for name, shape in self.shapes.items())


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


@contextlib.contextmanager
def _readable(label: str, file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{label}: {file} is not a readable safetensors file ({error}): it is truncated or corrupt, fetch it again"
        ) from error


def choose_weights(names: Iterable[str], label: str, read_index: Callable[[], str], elsewhere: str = "") -> list[str]:
    """Which files of a checkpoint hold its weights.

    Args:
        names: of all its files.
        label: how messages name it.
        read_index: gives the text of the index of a sharded checkpoint.
        elsewhere: where safetensors may be found if there are pickled weights only, for the message.

    Raises:
        CheckpointError: there are only pickled weights, none at all, or a shard that the index names is missing.
    """
    names = set(names)
    if WEIGHTS in names:
        return [WEIGHTS]
    if WEIGHTS_INDEX in names:
        try:
            shards = sorted(set(json.loads(read_index())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{label}: {WEIGHTS_INDEX} is not a safetensors index ({error})") from error
        missing = [name for name in shards if name not in names]
        if missing:
            raise CheckpointError(f"{label}: shard {missing[0]} named by {WEIGHTS_INDEX} is missing")
        return shards
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if pickled:
        raise CheckpointError(
            f"{label}: only pickled weights ({', '.join(pickled)}), which can run code and are never opened{elsewhere}"
            ". Convert them where you trust them, a full CLIP with its text tower, processor and tokenizer: "
            "CLIPModel.from_pretrained(...).save_pretrained(folder) and CLIPProcessor.from_pretrained(...)"
            ".save_pretrained(folder); CLIPVisionModel for a vision tower alone"
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
