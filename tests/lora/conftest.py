"""Adapters of the tiny tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_epimer.checkpoints.reader import Checkpoint
from hf_epimer.lora import Adapter


@pytest.fixture
def zoo(base_folder: Path, base: Checkpoint) -> list[Adapter]:
    """Three adapters of unlike ranks and targets: no layer is in all of them, fc2 is in one."""
    from helpers.adapters import make, read  # needs peft

    settings: list[dict[str, Any]] = [
        {"r": 4, "target_modules": ["q_proj", "fc1", "fc2"]},
        {"r": 2, "target_modules": ["q_proj", "fc1"], "use_rslora": True},
        {"r": 3, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 6}},
    ]
    return [read(make(base_folder, name, seed, **s), base) for seed, (name, s) in enumerate(zip("abc", settings))]
