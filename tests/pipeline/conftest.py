"""Adapters that are merged by the command."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from helpers.checkpoints import tiny_fisher
from helpers.statistics import tiny_kronecker


@pytest.fixture
def adapters(base_folder: Path) -> tuple[Path, Path]:
    """Two adapters of one base, of unlike ranks and targets, with statistics beside them."""
    from helpers.adapters import make  # needs peft

    a = make(base_folder, "a", 1, target_modules=["q_proj", "fc1"])
    b = make(base_folder, "b", 2, r=2, bias="lora_only", target_modules=["q_proj", "fc2"])
    for seed, folder in enumerate((a, b)):
        save_file(tiny_fisher(seed), folder / "fisher.safetensors", metadata={"format": "hf-epimer.fisher/1"})
        kronecker = {"format": "hf-epimer.kronecker/1"}
        save_file(tiny_kronecker(seed), folder / "kronecker.safetensors", metadata=kronecker)
    return a, b
