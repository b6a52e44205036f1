"""Files of statistics, their tensors named as the table in `hf_epimer.methods.statistic` says.

Besides plain fp32 a file can be small, which its header notes under `compress`:

    bf16     half the size, 3 significant digits
    rank1    Fisher information by the means of rows and columns (`hf_epimer.merging.compact`); about 0.3% of the size
"""

from __future__ import annotations

import logging
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
from hf_epimer.merging.compact import RANK_ONE_SUFFIXES, expanded, halved, means_of, split_stored_name
from hf_epimer.merging.inputs import check_shapes
from hf_epimer.methods.statistic import FISHER_FILE, STATISTICS_FILES, StatisticKind, StatisticsFile
from hf_epimer.types import Shape

logger = logging.getLogger(__name__)

Compression = Literal["bf16", "rank1"]


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
    if compress == "rank1" and file is not FISHER_FILE:
        raise StatisticsError(f"rank1 is for {FISHER_FILE.title}, not for {file.title}")
    if compress:
        header["compress"] = compress
    stored = halved(tensors) if file.is_halved else tensors
    if compress == "rank1":
        stored = means_of(stored)
    dtype = torch.bfloat16 if compress == "bf16" else torch.float32
    with atomic_file(path) as unfinished:
        save_file({name: value.to(dtype).contiguous() for name, value in stored.items()}, unfinished, metadata=header)


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
    wanted = {part.suffix for part in kind.parts} | {*RANK_ONE_SUFFIXES}

    def renamed(name: str) -> str | None:
        parameter, suffix = split_stored_name(name)
        known = canonical(parameter)
        return known + suffix if known is not None and suffix in wanted else None

    checkpoint = Checkpoint(label, [path], renamed)
    _check_format(checkpoint, path, kind)
    source = expanded(checkpoint, shapes)
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
