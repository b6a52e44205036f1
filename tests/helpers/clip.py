"""CLIP models so small that they are made in a moment: a full one with both towers, and fine-tuned vision towers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

from hf_epimer.demo.captions import clip_tokenizer
from hf_epimer.models.clip import CLIP
from hf_epimer.models.loading import load_tower, processor_class
from hf_epimer.models.weights import parameters_of


def write_clip(folder: Path, tokens: Sequence[str], merges: Sequence[tuple[str, str]], longest: int) -> Path:
    """A CLIP with two small towers of unlike widths and random weights; the last two tokens begin and end a text."""
    special = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    size = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 10}
    text = size | special | {"vocab_size": len(tokens), "hidden_size": 12, "max_position_embeddings": longest}
    vision = size | {"hidden_size": 16, "image_size": 8, "patch_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10))
        for parameter in model.parameters():  # the initial weights are so small that all classes look alike
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    clip_tokenizer(tokens, merges, longest).save_pretrained(folder)
    processor_class(CLIP)(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def write_tuned(folder: Path, base: Path, seed: int) -> Path:
    """The vision tower of a full model, fine-tuned by chance."""
    tower = load_tower(base)
    generator = torch.Generator().manual_seed(seed)
    tuned = {
        name: value.detach() + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in parameters_of(tower, CLIP).items()
    }
    tower.config.save_pretrained(folder)
    save_file(tuned, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def inside(tower: nn.Module) -> Any:
    """The module whose names are those of `CLIP.module_name`; in releases of transformers before 5.6 one level down."""
    return getattr(tower, "vision_model", tower)
