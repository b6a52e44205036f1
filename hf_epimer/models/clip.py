"""CLIP's vision tower. Everything that is CLIP's own stands here: names, shapes, residuals, and its text tower.

Names are `vision_model.*` in transformers 4 and in every full CLIPModel, without that prefix in a CLIPVisionModel of
transformers 5.6 and later; every version reads the former.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_epimer.models import vit
from hf_epimer.models.architecture import Architecture, Classification, Residual, ZeroShot
from hf_epimer.types import Shape

if TYPE_CHECKING:
    from torch import Tensor


def _parameters(config: Mapping[str, Any]) -> dict[str, Shape]:
    width, patch = config["hidden_size"], config["patch_size"]
    return {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, config["num_channels"], patch, patch),
        "embeddings.position_embedding.weight": (_positions(config), width),
        "pre_layrnorm.weight": (width,),
        "pre_layrnorm.bias": (width,),
        **block_parameters(config),
        "post_layernorm.weight": (width,),
        "post_layernorm.bias": (width,),
    }


def block_parameters(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Those of all blocks, which are SigLIP's, too."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, Shape] = {}
    for index in range(config["num_hidden_layers"]):
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
    return shapes


def _positions(config: Mapping[str, Any]) -> int:
    return vit.patches(config) + 1


def _features(tower: Any, pixels: Tensor) -> Tensor:
    features: Tensor = tower(pixel_values=pixels).pooler_output
    return features


def _mean_of_patches(tower: Any, pixels: Tensor) -> Tensor:
    mean: Tensor = tower(pixel_values=pixels).last_hidden_state[:, 1:].mean(1)
    return mean


def _attention(block: Any, hidden: Tensor) -> Tensor:
    attended: Tensor = block.self_attn(block.layer_norm1(hidden), attention_mask=None)[0]
    return hidden + attended


def _mlp(block: Any, hidden: Tensor) -> Tensor:
    change: Tensor = block.mlp(block.layer_norm2(hidden))
    return hidden + change


def _embed(model: Any, tokens: Any) -> Tensor:
    """Beside `get_text_features`, which returns another type in each release of transformers."""
    embedded: Tensor = model.text_projection(model.text_model(**tokens).pooler_output)
    return embedded


RESIDUALS = (
    Residual(_attention, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"),
    Residual(_mlp, ("mlp.fc1",), "mlp.fc2"),
)

CLIP = Architecture(
    name="CLIP vision model",
    tag="clip",
    model_types={"clip_vision_model": None, "clip": "vision_config"},
    fields=vit.SIZES | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    parameters=_parameters,
    prefix="vision_model.",
    nested=("vision_model.", "vision_tower.", "clip.", "model."),
    roots=("embeddings", "encoder", "pre_layrnorm", "post_layernorm"),
    ignored=("text_model.", "text_projection", "visual_projection", "logit_scale", "embeddings.position_ids"),
    classifiers=("classifier.",),
    library="transformers.models.clip.modeling_clip",
    output_class="CLIPVisionModel",
    since="5.6",
    tower_classes=("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    processors=("CLIPImageProcessorPil", "CLIPImageProcessor"),  # the plain name needs no torchvision before the other
    carried=("projection_dim",),
    features=_features,
    positions=_positions,
    blocks="encoder.layers",
    residuals=RESIDUALS,
    known={
        (768, 12, 12, 32, 224): "openai/clip-vit-base-patch32",
        (768, 12, 12, 16, 224): "openai/clip-vit-base-patch16",
        (1024, 24, 16, 14, 224): "openai/clip-vit-large-patch14",
    },
    known_by=("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"),
    zero_shot=ZeroShot(
        model_types=("clip",),
        model_class="CLIPModel",
        vision="vision_model",
        files=frozenset(
            {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"}
        ),
        tokenizers=(frozenset({"tokenizer.json"}), frozenset({"vocab.json", "merges.txt"})),
        tokenizer_classes=("CLIPTokenizer", "CLIPTokenizerFast"),
        projection="visual_projection.weight",
        logit_scale="logit_scale",
        embed=_embed,
    ),
    classification=Classification(
        "CLIPForImageClassification",
        "clip",
        "vision_model.",
        _mean_of_patches,
        unread=("post_layernorm.",),
    ),
)
