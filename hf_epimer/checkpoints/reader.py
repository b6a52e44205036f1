"""Checkpoint files: a lazy reader of (sharded) safetensors. Files only, no Hub, no model class.

Everything that has one tensor per parameter is a checkpoint: base, fine-tuned models, Fisher diagonals, Gram matrices.
Opening one reads headers only; a tensor is read when it is asked for, into a buffer that the caller owns.
"""

from __future__ import annotations

import contextlib
import copy
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
from hf_epimer.outside import LARGEST, LARGEST_LISTING, Unreadable, open_file, parse_json, read_text
from hf_epimer.types import Shape

WEIGHTS = "model.safetensors"
WEIGHT_NAMES = (WEIGHTS, "diffusion_pytorch_model.safetensors")
"""What one file of weights is called: by transformers, and by diffusers."""

PICKLED = (".bin", ".pt", ".pth", ".ckpt")

FORMATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


COUNTERS = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types of what lies beside weights and is no weight."""


def index_of(weights: str) -> str:
    """The name of the index that there is instead where these weights lie in shards."""
    return f"{weights}.index.json"


WEIGHTS_INDEX = index_of(WEIGHTS)


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


@runtime_checkable
class PiecewiseSource(TensorSource, Protocol):
    """A source that gives a part of a tensor for a part of the cost."""

    def copy_piece_to(self, name: str, piece: slice, out: Tensor) -> None:
        """Copy some elements, in the order of the tensor's memory, to `out`, which has as many."""


class StateDict:
    """A `PiecewiseSource` over tensors in memory."""

    def __init__(self, label: str, tensors: Mapping[str, Tensor]) -> None:
        self.label = label
        self._tensors = tensors
        self.shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def copy_to(self, name: str, out: Tensor) -> None:
        out.copy_(self.tensor(name))

    def copy_piece_to(self, name: str, piece: slice, out: Tensor) -> None:
        out.copy_(self.tensor(name).flatten()[piece].view(out.shape))


class Checkpoint:
    """A lazy `PiecewiseSource` over safetensors files. What `canonical` drops is listed in `left_out`, as it is stored.

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
        self.left_out: list[str] = []
        self._places: dict[str, tuple[Any, str, Path]] = {}
        self._descriptors: dict[Path, _Descriptor] = {}
        self._opening = threading.Lock()
        for file in files:
            with _readable(label, file):
                _header_length(file)
                handle = safe_open(file, framework="pt")
                self.metadata.update(handle.metadata() or {})
                for stored in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                    name = canonical(stored)
                    if name is None:
                        self.left_out.append(stored)
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
            tensor: Tensor = handle.get_tensor(stored)  # mapped, not read: the system may drop its pages at any time
        return tensor.view(self.shapes[name])

    def reshaped(self, shapes: Mapping[str, Shape]) -> Checkpoint:
        """Some of its tensors, in that order, each in a shape of as many elements."""
        others = copy.copy(self)
        others.shapes = dict(shapes)
        return others

    def copy_to(self, name: str, out: Tensor) -> None:
        self.copy_piece_to(name, slice(0, out.numel(), 1), out)

    def copy_piece_to(self, name: str, piece: slice, out: Tensor) -> None:
        _, stored, file = self._places[name]
        as_stored = self.dtypes[name] == FORMATS.get(out.dtype) and out.is_contiguous() and out.device.type == "cpu"
        if not as_stored or not hasattr(os, "preadv"):
            out.copy_(self.tensor(name).flatten()[piece].view(out.shape))
            return
        if piece.step != 1:  # a mapped file would be in memory as a whole
            between = out.new_empty(piece.stop - piece.start)
            self.copy_piece_to(name, slice(piece.start, piece.stop, 1), between)
            out.copy_(between[:: piece.step].view(out.shape))
            return
        with _readable(self.label, file):
            skipped = piece.start * out.element_size()
            self._descriptor(file).read(stored, skipped, out.flatten().view(torch.uint8).numpy().data)

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
        self.places, self.start = _read_header(path)
        self.file = open(path, "rb")  # noqa: SIM115  (lives as long as the checkpoint)

    def read(self, name: str, skipped: int, target: memoryview) -> None:
        """Fill `target` with the tensor's bytes behind `skipped` of them; safe to call from several threads."""
        place, done = self.start + self.places[name][0] + skipped, 0
        while done < len(target):
            count = os.preadv(self.file.fileno(), [target[done:]], place + done)
            if count == 0:
                raise OSError(f"{name} ends early")
            done += count

    def will_need(self, name: str) -> None:
        if hasattr(os, "posix_fadvise"):  # not on macOS, whose own read-ahead has to do
            begin, end = self.places[name]
            os.posix_fadvise(self.file.fileno(), self.start + begin, end - begin, os.POSIX_FADV_WILLNEED)


_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def check_whole(file: Path, label: str) -> None:
    """Refuse a safetensors file that ends before its last tensor does, or after it.

    Raises:
        CheckpointError: naming it.
    """
    with _readable(label, file):
        places, start = _read_header(file)
        expected = start + max((end for _, end in places.values()), default=0)
        if (found := file.stat().st_size) != expected:
            raise ValueError(f"{found} bytes instead of {expected}")


def _header_length(file: Path) -> int:
    """Bytes of a safetensors file's header.

    Raises:
        OSError: it may not be read.
        ValueError: it has none, or one that is too large.
    """
    with open_file(file) as opened:
        start = opened.read(8)
    if len(start) < 8:
        raise ValueError("it has no header")
    length = int(struct.unpack("<Q", start)[0])
    if length > LARGEST_LISTING:
        raise ValueError(f"its header of {length} bytes is larger than any model's, {LARGEST_LISTING} at most")
    return length


def _read_header(file: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each tensor lies behind the header (begin, end), and where the header ends."""
    length = _header_length(file)
    with open_file(file) as opened:
        header = parse_json(opened.read(8 + length)[8:].decode("utf-8"))
    try:
        places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        return {name: (int(begin), int(end)) for name, (begin, end) in places.items()}, 8 + length
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError("its header does not list tensors") from error


@contextlib.contextmanager
def _readable(label: str, file: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise CheckpointError(f"{label}: {file} may not be read (permission denied)") from error
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{label}: {file} is not a readable safetensors file ({error}): it is truncated or corrupt, fetch it again"
        ) from error


def choose_weights(
    names: Iterable[str], label: str, read_index: Callable[[str], str], elsewhere: str = "", listing: str = ""
) -> list[str]:
    """Which files of a checkpoint hold its weights.

    Args:
        names: of all its files.
        label: how messages name it.
        read_index: gives the text of the index of a sharded checkpoint, by its name.
        elsewhere: where safetensors may be found if there are pickled weights only, for the message.
        listing: what there is instead of weights, for the message.

    Raises:
        CheckpointError: there are only pickled weights, none at all, or a shard that the index names is missing.
    """
    names = set(names)
    for whole in WEIGHT_NAMES:
        if whole in names:
            return [whole]
        if (index := index_of(whole)) not in names:
            continue
        try:
            shards = sorted(set(parse_json(read_index(index))["weight_map"].values()))
            if not shards:
                raise ValueError("it names no file")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{label}: {index} is not a safetensors index ({error})") from error
        missing = [name for name in shards if name not in names]
        if missing:
            raise CheckpointError(f"{label}: shard {missing[0]} named by {index} is missing")
        return shards
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if pickled:
        raise CheckpointError(
            f"{label}: only pickled weights ({', '.join(pickled)}), which can run code and are never opened{elsewhere}"
            ". Convert them where you trust them, a full CLIP with its text tower, processor and tokenizer: "
            "CLIPModel.from_pretrained(...).save_pretrained(folder) and CLIPProcessor.from_pretrained(...)"
            ".save_pretrained(folder); CLIPVisionModel for a vision tower alone"
        )
    found = f"; {listing}" if listing else ""
    raise CheckpointError(f"{label}: no {WEIGHTS} (or {WEIGHTS_INDEX}) among its files{found}")


def read_json(file: Path, label: str, largest: int = LARGEST) -> dict[str, Any]:
    """A JSON object from a file of at most `largest` bytes.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    content = read_any_json(file, label, largest)
    if not isinstance(content, dict):
        raise CheckpointError(f"{label}: {file.name} is not a JSON object")
    return content


def read_any_json(file: Path, label: str, largest: int = LARGEST) -> Any:
    """What a JSON file of at most `largest` bytes holds, be it an object, a list or a single value.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    try:
        return parse_json(read_text(file, largest))
    except FileNotFoundError as error:
        raise CheckpointError(f"{label}: {file.name} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{label}: {file.name} cannot be read ({error.strerror or error})") from error
    except Unreadable as error:
        raise CheckpointError(f"{label}: {file.name} is not readable JSON ({error})") from error
