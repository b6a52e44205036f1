"""DINOv3: queries and keys are turned by the places of patches (RoPE); registers, LayerScale in every block.

transformers has no classifier of it: a task brings its own head, which reads the class token.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import TYPE_CHECKING, Any

from hf_epimer.models import vit
from hf_epimer.models.architecture import Architecture, Residual
from hf_epimer.models.dinov2 import mlp
from hf_epimer.types import Shape

if TYPE_CHECKING:
    from torch import Tensor

_ATTENTION = {"q_proj": "query_bias", "k_proj": "key_bias", "v_proj": "value_bias", "o_proj": "proj_bias"}
"""Its linear layers -> the field that says whether one has a bias."""


def _parameters(config: Mapping[str, Any]) -> dict[str, Shape]:
    width, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    shapes: dict[str, Shape] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, 1, width),
        "embeddings.register_tokens": (1, config["num_register_tokens"], width),
        "embeddings.patch_embeddings.weight": (width, config["num_channels"], patch, patch),
        "embeddings.patch_embeddings.bias": (width,),
    }
    for index in range(config["num_hidden_layers"]):
        block = f"layer.{index}."
        linear: dict[str, tuple[Shape, bool]] = {
            f"attention.{name}": ((width, width), config[bias]) for name, bias in _ATTENTION.items()
        }
        linear |= {
            "mlp.up_proj": ((inner, width), config["mlp_bias"]),
            "mlp.down_proj": ((width, inner), config["mlp_bias"]),
        }
        for name, (shape, has_bias) in linear.items():
            shapes[f"{block}{name}.weight"] = shape
            if has_bias:
                shapes[f"{block}{name}.bias"] = shape[:1]
        for number in (1, 2):
            shapes |= {f"{block}norm{number}.weight": (width,), f"{block}norm{number}.bias": (width,)}
            shapes[f"{block}layer_scale{number}.lambda1"] = (width,)
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def _features(tower: Any, pixels: Tensor) -> Tensor:
    token: Tensor = tower(pixel_values=pixels).last_hidden_state[:, 0]
    return token


def _rotations(config: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for the patches of a square picture, [patches, width of a head] each; none drawn at random."""
    from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTRopePositionEmbedding

    rotations = DINOv3ViTRopePositionEmbedding(config).eval().to(hidden.device)
    side = isqrt(hidden.shape[1] - 1 - config.num_register_tokens) * config.patch_size
    turned: tuple[Tensor, Tensor] = rotations(hidden.new_empty(1, 1, side, side))
    return turned


def _attention(block: Any, hidden: Tensor) -> Tensor:
    turned = _rotations(block.attention.config, hidden)
    change: Tensor = block.layer_scale1(block.attention(block.norm1(hidden), position_embeddings=turned)[0])
    return hidden + change


DINOV3 = Architecture(
    name="DINOv3 ViT",
    tag="dinov3_vit",
    model_types={"dinov3_vit": None},
    fields=vit.SIZES
    | {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "rope_theta": 100.0, "num_register_tokens": 0}
    | {"query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True}
    | {"use_gated_mlp": False},
    unsupported={"use_gated_mlp": True},
    parameters=_parameters,
    roots=("embeddings", "layer", "norm"),
    renamed=(("model.layer", "layer"),),
    unread=("embeddings.mask_token",),
    library="transformers.models.dinov3_vit.modeling_dinov3_vit",
    output_class="DINOv3ViTModel",
    since="5.4",
    tower_classes=("DINOv3ViTModel",),
    processors=("ViTImageProcessorPil", "ViTImageProcessor"),  # its own needs torchvision, and rounds later
    features=_features,
    positions=lambda config: vit.patches(config) + 1 + config["num_register_tokens"],
    stretches=True,
    blocks="layer",
    residuals=(
        Residual(
            _attention,
            reads=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            writes="attention.o_proj",
            scale="layer_scale1.lambda1",
        ),
        Residual(mlp, reads=("mlp.up_proj",), writes="mlp.down_proj", scale="layer_scale2.lambda1"),
    ),
)
