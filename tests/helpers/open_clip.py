"""A CLIPModel of transformers as OpenCLIP would have saved it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from hf_epimer.models.clip import CLIP

BLOCK = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc"}
MODULES = {
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "text_model.final_layer_norm": "ln_final",
    "text_model.embeddings.token_embedding": "token_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
}


def in_open_clip(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A CLIPModel's tensors as OpenCLIP names, fuses and transposes them."""
    found = {
        "visual.class_embedding": tensors["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": tensors["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": tensors["visual_projection.weight"].T.contiguous(),
        "positional_embedding": tensors["text_model.embeddings.position_embedding.weight"],
        "text_projection": tensors["text_projection.weight"].T.contiguous(),
        "logit_scale": tensors["logit_scale"],
        "attn_mask": torch.zeros(2, 2),
    }
    pairs = dict(MODULES)
    for ours, theirs in (("vision", "visual."), ("text", "")):
        for number in range(layers):
            inside, outside = f"{ours}_model.encoder.layers.{number}.", f"{theirs}transformer.resblocks.{number}."
            pairs |= {inside + module: outside + name for module, name in {**BLOCK, "mlp.fc2": "mlp.c_proj"}.items()}
            for kind in ("weight", "bias"):
                parts = [tensors[f"{inside}self_attn.{part}_proj.{kind}"] for part in "qkv"]
                found[f"{outside}attn.in_proj_{kind}"] = torch.cat(parts)
    for ours, theirs in pairs.items():
        found |= {
            f"{theirs}.{kind}": tensors[f"{ours}.{kind}"] for kind in ("weight", "bias") if f"{ours}.{kind}" in tensors
        }
    return found


def write_open_clip(folder: Path, clip: Path) -> Path:
    """The test's CLIP in OpenCLIP's layout, with its tokenizer."""
    model = transformers.CLIPModel.from_pretrained(clip)
    vision, text = model.config.vision_config, model.config.text_config
    folder.mkdir()
    save_file(in_open_clip(model.state_dict(), vision.num_hidden_layers), folder / "open_clip_model.safetensors")
    of_vision = {"image_size": vision.image_size, "patch_size": vision.patch_size, "width": vision.hidden_size}
    of_vision |= {"layers": vision.num_hidden_layers, "head_width": vision.hidden_size // vision.num_attention_heads}
    of_vision["mlp_ratio"] = vision.intermediate_size / vision.hidden_size
    of_text = {"context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size}
    of_text |= {"heads": text.num_attention_heads, "layers": text.num_hidden_layers}
    of_text["mlp_ratio"] = text.intermediate_size / text.hidden_size
    described = {
        "embed_dim": model.config.projection_dim,
        "quick_gelu": True,
        "vision_cfg": of_vision,
        "text_cfg": of_text,
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    assert CLIP.zero_shot
    for name in CLIP.zero_shot.files:
        if (clip / name).is_file():
            (folder / name).write_bytes((clip / name).read_bytes())
    return folder
