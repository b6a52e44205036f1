"""Files of statistics, their tensors named as the table in `hf_epimer.methods.statistic` says.

Besides plain fp32 a Fisher file can be small, which its header notes under `compress`:

    bf16     half the size, 3 significant digits
    rank1    v ~ r c^T / mean(v) with r, c the means of the rows and columns of a matrix (and of a convolution seen as
             one), stored under `<name>.rows` and `<name>.columns`; about 0.3% of the size
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_epimer.checkpoints.atomic import atomic_file
from hf_epimer.checkpoints.reader import Checkpoint, TensorSource
from hf_epimer.errors import StatisticsError
from hf_epimer.merging.inputs import check_shapes
from hf_epimer.methods.statistic import FISHER_FILE, STATISTICS_FILES, StatisticKind, StatisticsFile, split_name
from hf_epimer.types import Shape

logger = logging.getLogger(__name__)

Compression = Literal["bf16", "rank1"]

_RANK_ONE = {".rows", ".columns"}


@dataclass(frozen=True)
class StatisticsMetadata:
    """Where an estimate comes from; written as strings into the file's header. No path of this machine gets in.

    Attributes:
        samples: how many were used.
        labels: `true` or `sampled`.
        kind: `per-sample` squares, or `squared-mean`, `adam`.
    """

    samples: int
    task: str
    dataset: str
    dataset_revision: str
    model: str
    model_sha: str
    labels: str
    seed: int
    kind: str = "per-sample"


def save_statistics(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: StatisticsMetadata,
    file: StatisticsFile = FISHER_FILE,
    compress: Compression | None = None,
) -> None:
    """Write an estimate; the file appears under its name only when it is complete.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to.
        StatisticsError: only Fisher information can be compressed to rank 1.
    """
    path = Path(path)
    header = {"format": file.format} | {key: str(value) for key, value in asdict(metadata).items()}
    if compress:
        if file is not FISHER_FILE:
            raise StatisticsError(f"--compress is for {FISHER_FILE.title}, not for {file.title}")
        header["compress"] = compress
    stored = _COMPRESSORS[compress](tensors) if compress else {name: value.float() for name, value in tensors.items()}
    with atomic_file(path) as unfinished:
        save_file({name: value.contiguous() for name, value in stored.items()}, unfinished, metadata=header)


def open_statistics(
    path: Path,
    label: str,
    kind: StatisticKind,
    shapes: Mapping[str, Shape],
    canonical: Callable[[str], str | None],
) -> TensorSource:
    """A lazy reader of one statistic in a file; compressed ones are expanded tensor by tensor, as they are read.

    Args:
        kind: one that is found in files.
        shapes: canonical name -> shape of every parameter of the model.
        canonical: maps a stored parameter's name to a canonical one.

    Raises:
        CheckpointError: the file is truncated or corrupt.
        MismatchError: names or shapes are unlike the model's.
        StatisticsError: it says of itself that it holds something else.
    """
    wanted = {part.suffix for part in kind.parts} | _RANK_ONE

    def renamed(name: str) -> str | None:
        parameter, suffix = _split_name(name)
        known = canonical(parameter)
        return known + suffix if known is not None and suffix in wanted else None

    checkpoint = Checkpoint(label, [path], renamed)
    _check_format(checkpoint, path, kind)
    source = _RankOne(checkpoint, shapes) if checkpoint.metadata.get("compress") == "rank1" else checkpoint
    check_shapes(kind.shapes(shapes), source, "the file")
    return source


def _check_format(checkpoint: Checkpoint, path: Path, kind: StatisticKind) -> None:
    """Whether the file holds this statistic, as far as it says what it holds.

    Raises:
        StatisticsError: it says that it holds another.
    """
    assert kind.file is not None
    stated, expected = checkpoint.metadata.get("format", ""), kind.file.format
    if stated != expected and stated in {file.format for file in STATISTICS_FILES}:
        raise StatisticsError(f"{checkpoint.label}: {path} holds {stated}, and {expected} is needed")
    if stated != expected:
        logger.warning("%s: %s carries no %s metadata; taken as it is", checkpoint.label, path, expected)


def _split_name(stored: str) -> tuple[str, str]:
    """As `split_name`, and the names of tensors stored by their means."""
    suffix = next((suffix for suffix in _RANK_ONE if stored.endswith(suffix)), "")
    return (stored.removesuffix(suffix), suffix) if suffix else split_name(stored)


def rank_one(values: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the rows and of the columns of v seen as a matrix m x (the rest): lengths m and n."""
    matrix = values.flatten(1).float()
    return matrix.mean(1), matrix.mean(0)


def from_rank_one(rows: Tensor, columns: Tensor) -> Tensor:
    """r c^T / mean(r), m x n: the rank-one matrix with these means of rows and columns."""
    mean = rows.mean()
    return torch.outer(rows / mean, columns) if bool(mean > 0) else rows.new_zeros(len(rows), len(columns))


def _to_bf16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.bfloat16() for name, value in tensors.items()}


def _to_rank_one(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stored = {}
    for name, value in tensors.items():
        if value.ndim < 2:
            stored[name] = value.float()
        else:
            stored[f"{name}.rows"], stored[f"{name}.columns"] = rank_one(value)
    return stored


_COMPRESSORS: dict[Compression, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "bf16": _to_bf16,
    "rank1": _to_rank_one,
}


class _RankOne:
    """A file whose matrices are stored as means of rows and columns; it looks like one that holds them in full."""

    def __init__(self, stored: Checkpoint, shapes: Mapping[str, Shape]) -> None:
        self.label = stored.label
        self.stored = stored
        self.shapes: dict[str, Shape] = {}
        for name, shape in stored.shapes.items():
            own = name.removesuffix(".rows")
            if name.endswith(".columns"):
                continue
            if own != name:
                factors = (*shape, *stored.shapes.get(f"{own}.columns", ()))
                full = tuple(shapes.get(own, factors))
                shape = full if factors == (full[0], math.prod(full[1:])) else factors
            self.shapes[own] = shape

    def tensor(self, name: str) -> Tensor:
        if name in self.stored.shapes:
            return self.stored.tensor(name)
        rows, columns = self.stored.tensor(f"{name}.rows"), self.stored.tensor(f"{name}.columns")
        return from_rank_one(rows.float(), columns.float()).view(self.shapes[name])

    def copy_to(self, name: str, out: Tensor) -> None:
        out.copy_(self.tensor(name))
