"""Solved blocks of a calibration, kept until it is done: a run that is begun again goes on behind the last of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_epimer.checkpoints.atomic import atomic_file
from hf_epimer.models.weights import Block


def block_file(workspace: Path, number: int) -> Path:
    """Where a solved block is kept."""
    return workspace / f"block-{number}.safetensors"


def keep_block(block: Block, sizes: Mapping[str, float], path: Path) -> None:
    """A solved block, for a run that is begun again."""
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in block.parameters.items()}
    with atomic_file(path) as unfinished:
        save_file(
            tensors | {f"{name}.size": torch.tensor(size, dtype=torch.float64) for name, size in sizes.items()},
            unfinished,
        )


def restore_block(block: Block, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Put a solved block's weights in place; the sizes of its steps."""
    for name, parameter in block.parameters.items():
        parameter.copy_(tensors[name])
    return {name.removesuffix(".size"): float(size) for name, size in tensors.items() if name.endswith(".size")}
