"""A tiny CLIP vision tower: its tensors, and folders as they would lie on the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_epimer.models.clip import CLIP

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": 16,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

StateDict = dict[str, Tensor]


def tiny_state(seed: int, like: StateDict | None = None, scale: float = 0.1) -> StateDict:
    """A random tower; with `like`, a fine-tuned version of it."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in CLIP.shapes(TINY).items()}
    return state if like is None else {name: like[name] + scale * value.to(like[name]) for name, value in state.items()}


def tiny_fisher(seed: int) -> StateDict:
    """Positive values over several orders of magnitude, as Fisher diagonals are."""
    return {name: (2 * value).exp() * 1e-7 for name, value in tiny_state(seed).items()}


def write_checkpoint(
    folder: Path,
    state: StateDict,
    *,
    config: dict[str, object] | None = None,
    fisher: StateDict | None = None,
    card: str | None = None,
) -> Path:
    """A CLIPVisionModel folder as it would lie on the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "projection_dim": 24, **TINY}
    (folder / "config.json").write_text(json.dumps({**content, **(config or {})}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if fisher is not None:
        save_file(fisher, folder / "fisher.safetensors", metadata={"format": "hf-epimer.fisher/1"})
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def rewrite(folder: Path, change: Callable[[StateDict], object], file: str = "model.safetensors") -> None:
    state = load_file(folder / file)
    change(state)
    save_file(state, folder / file, metadata={"format": "hf-epimer.fisher/1"})


def card(base: str) -> str:
    return f"---\nbase_model: {base}\n---\n"
