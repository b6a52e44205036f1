"""Adapters of the tiny tower, made and folded by PEFT itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.checkpoints import StateDict
from helpers.versions import needs_transformers
from hf_epimer.checkpoints.reader import Checkpoint
from hf_epimer.lora import Adapter, merge_adapters, read_adapter
from hf_epimer.methods import METHODS
from hf_epimer.models.clip import CLIP
from hf_epimer.numerics.lowrank import LowRank

peft = pytest.importorskip("peft")

LAYER = "vision_model.encoder.layers.0."
QUERY, FC1 = f"{LAYER}self_attn.q_proj.weight", f"{LAYER}mlp.fc1.weight"
NEWEST = {"module_name": CLIP.module_name, "model_class": (CLIP.output_class, CLIP.library)}
ADAPTER_FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "merge_config.json",
    "merge_report.json",
]
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def vision(folder: Path) -> Any:
    from transformers import CLIPVisionModel

    return CLIPVisionModel.from_pretrained(folder)


def make(base_folder: Path, name: str, seed: int, **settings: Any) -> Path:
    """An adapter as PEFT saves it, its parameters random."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 6, "target_modules": EVERYWHERE} | settings
    model = peft.get_peft_model(vision(base_folder), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    folder = base_folder.parent / name
    model.save_pretrained(folder)
    return folder


def key_of(folder: Path, parameter: str) -> str:
    """What PEFT calls a parameter's A; releases of transformers before 5.6 have a prefix in it."""
    end = f".{CLIP.module_name(parameter).removesuffix('.weight')}.lora_A.weight"
    return next(key for key in load_file(folder / "adapter_model.safetensors") if key.endswith(end))


def folded(folder: Path, base_folder: Path) -> StateDict:
    """What PEFT makes of an adapter: base + B A under canonical names. Any warning means that keys did not fit."""
    needs_transformers(CLIP.since, "adapters as they are merged")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        model = peft.PeftModel.from_pretrained(vision(base_folder), folder).merge_and_unload()
    return {str(CLIP.canonical(name)): value.detach() for name, value in model.state_dict().items()}


def rewrite_config(folder: Path, **entries: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def rewrite_weights(folder: Path, change: Callable[[StateDict], Any]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def read(folder: Path, base: Checkpoint) -> Adapter:
    return read_adapter(folder, base, CLIP.canonical)


def dense(adapter: Adapter, name: str) -> Tensor:
    out = torch.empty(adapter.shapes[name], dtype=torch.float64)
    adapter.task_vector_to(name, out)
    return out


def updates_of(adapters: list[Adapter], method: str = "frechet-lora", config: Any = None, **more: Any) -> StateDict:
    config = config or METHODS[method].config()
    found = merge_adapters(adapters, METHODS[method], config, **more)
    return {
        u.name: u.update.dense().view(u.shape) if isinstance(u.update, LowRank) else u.update.double() for u in found
    }


def difference(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-12))  # DARE may drop everything
