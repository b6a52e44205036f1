"""CLIP's vision tower: names, shapes, stages. Everything that is CLIP's own stands here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_epimer.models.architecture import Architecture, Stage
from hf_epimer.types import Shape


def _clip_vision_shapes(tower: Mapping[str, Any]) -> dict[str, Shape]:
    width, inner, patch = tower["hidden_size"], tower["intermediate_size"], tower["patch_size"]
    positions = (tower["image_size"] // patch) ** 2 + 1
    shapes: dict[str, Shape] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, tower["num_channels"], patch, patch),
        "embeddings.position_embedding.weight": (positions, width),
        "pre_layrnorm.weight": (width,),
        "pre_layrnorm.bias": (width,),
    }
    for index in range(tower["num_hidden_layers"]):
        block = f"encoder.layers.{index}."
        linear = {
            **{f"self_attn.{part}_proj": (width, width) for part in ("k", "v", "q", "out")},
            "mlp.fc1": (inner, width),
            "mlp.fc2": (width, inner),
        }
        for part in ("layer_norm1", "layer_norm2"):
            shapes[f"{block}{part}.weight"] = (width,)
            shapes[f"{block}{part}.bias"] = (width,)
        for part, shape in linear.items():
            shapes[f"{block}{part}.weight"] = shape
            shapes[f"{block}{part}.bias"] = shape[:1]
    shapes["post_layernorm.weight"] = (width,)
    shapes["post_layernorm.bias"] = (width,)
    return shapes


CLIP_VISION = Architecture(
    name="CLIP vision model",
    prefix="vision_model.",
    nested=("model.vision_model.", "clip.vision_model.", "vision_model.", "clip.", "model."),
    tower=("embeddings", "encoder", "pre_layrnorm", "post_layernorm"),
    ignored=("text_model.", "text_projection", "logit_scale", "embeddings.position_ids"),
    head="visual_projection.weight",
    model_types={"clip_vision_model": None, "clip": "vision_config"},
    defaults={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    output_class="CLIPVisionModel",
    output_type="clip_vision_model",
    known={
        (768, 12, 12, 32, 224): "openai/clip-vit-base-patch32",
        (768, 12, 12, 16, 224): "openai/clip-vit-base-patch16",
        (1024, 24, 16, 14, 224): "openai/clip-vit-large-patch14",
    },
    shape_fields=("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"),
    parameters=_clip_vision_shapes,
    blocks="encoder.layers",
    stages=(
        Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Stage(("self_attn.out_proj",), residual="layer_norm1"),
        Stage(("mlp.fc1",)),
        Stage(("mlp.fc2",), residual="layer_norm2"),
    ),
)
