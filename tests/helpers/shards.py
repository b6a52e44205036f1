"""Models of no family that is known here, in shards of a few kilobytes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_epimer.checkpoints.reader import WEIGHTS
from hf_epimer.checkpoints.writer import Shards

VOCABULARY, WIDTH, INNER = 40, 16, 24
CONFIG = {"model_type": "tiny-lm", "architectures": ["TinyForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": WIDTH}


def language_model(seed: int, like: dict[str, Tensor] | None = None, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """Two layers with tied embeddings, a convolution and a counter; with `like`, a fine-tuned version of it."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(2):
        block = f"model.layers.{layer}."
        shapes |= {f"{block}attn.{part}.weight": (WIDTH, WIDTH) for part in ("q", "k")}
        shapes |= {f"{block}mlp.up.weight": (INNER, WIDTH), f"{block}mlp.down.weight": (WIDTH, INNER)}
        shapes |= {f"{block}norm.weight": (WIDTH,)}
    shapes["model.conv.weight"] = (6, 4, 3, 3)
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors = noise if like is None else {name: like[name].float() + 0.1 * noise[name] for name in noise}
    return {name: tensor.bfloat16() for name, tensor in tensors.items()} | {"model.steps": torch.tensor([7])}


def write_shards(folder: Path, tensors: dict[str, Tensor], weights: str = WEIGHTS, **config: object) -> Path:
    """A checkpoint as transformers writes it, tokenizer and all."""
    folder.mkdir(parents=True)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with Shards(folder, layout, max_shard_bytes=1500, weights=weights) as shards:
        shards.create()
        for name, tensor in tensors.items():
            shards.write(name, tensor)
        shards.write_index()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "dtype": "bfloat16", **config}))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "generation_config.json").write_text('{"do_sample": true}')
    return folder


def read_shards(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whatever their files are called."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
