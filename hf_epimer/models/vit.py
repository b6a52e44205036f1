"""ViT: a class token, pre-norm blocks, a final layer norm; classified by a linear layer on the class token.

Names are those of a ViTForImageClassification in files; memory has others from transformers 5.10 on. What other
families have in common with it is imported from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hf_epimer.models.architecture import Architecture, Classification, Residual
from hf_epimer.types import Shape

if TYPE_CHECKING:
    from torch import Tensor

SIZES: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
}
"""Fields of a vision config that all families here have -> transformers' defaults: those of a ViT-B/16."""

FIELDS = SIZES | {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True}

ATTENTION_RENAMED = (
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
)
_RENAMED = (
    ("layers", "encoder.layer"),
    *ATTENTION_RENAMED,
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)


def embedding_parameters(config: Mapping[str, Any], tokens: int) -> dict[str, Shape]:
    """A class token, positions of all patches and of `tokens` others, and the projection of patches."""
    width, patch = config["hidden_size"], config["patch_size"]
    return {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, patches(config) + tokens, width),
        "embeddings.patch_embeddings.projection.weight": (width, config["num_channels"], patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
    }


def attention_parameters(config: Mapping[str, Any], block: str) -> Iterator[tuple[str, Shape]]:
    """The four projections of a block's attention; not all have biases for what is read."""
    width = config["hidden_size"]
    for part in ("query", "key", "value"):
        yield f"{block}attention.attention.{part}.weight", (width, width)
        if config["qkv_bias"]:
            yield f"{block}attention.attention.{part}.bias", (width,)
    yield f"{block}attention.output.dense.weight", (width, width)
    yield f"{block}attention.output.dense.bias", (width,)


def block_parameters(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Those of all blocks, and of the layer norm behind them."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, Shape] = {}
    for index in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{index}."
        shapes |= dict(attention_parameters(config, block))
        for part, shape in (("intermediate", (inner, width)), ("output", (width, inner))):
            shapes |= {f"{block}{part}.dense.weight": shape, f"{block}{part}.dense.bias": shape[:1]}
        for part in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{block}{part}.weight": (width,), f"{block}{part}.bias": (width,)}
    return shapes | {"layernorm.weight": (width,), "layernorm.bias": (width,)}


def patches(config: Mapping[str, Any]) -> int:
    """How many a picture is cut into."""
    count: int = (config["image_size"] // config["patch_size"]) ** 2
    return count


def features(tower: Any, pixels: Tensor) -> Tensor:
    """Of a model for classification without classes: what its classifier would read."""
    read: Tensor = tower(pixel_values=pixels).logits
    return read


def attended(attention: Any, read: Tensor) -> Tensor:
    """What an attention adds; some releases of transformers give its weights beside it."""
    output = attention(read)
    added: Tensor = output[0] if isinstance(output, tuple) else output
    return added


def _attention(block: Any, hidden: Tensor) -> Tensor:
    return hidden + attended(block.attention, block.layernorm_before(hidden))


def _mlp(block: Any, hidden: Tensor) -> Tensor:
    read = block.layernorm_after(hidden)
    if hasattr(block, "mlp"):
        change: Tensor = block.mlp(read)
        return hidden + change
    summed: Tensor = block.output(block.intermediate(read), hidden)  # before transformers 5.10
    return summed


_RESIDUALS = (
    Residual(
        _attention,
        reads=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        writes="attention.output.dense",
    ),
    Residual(_mlp, reads=("intermediate.dense",), writes="output.dense"),
)

VIT = Architecture(
    name="ViT",
    tag="vit",
    model_types={"vit": None},
    fields=FIELDS,
    parameters=lambda config: embedding_parameters(config, tokens=1) | block_parameters(config),
    prefix="vit.",
    nested=("vit.",),
    roots=("embeddings", "encoder", "layernorm"),
    ignored=("pooler.", "decoder.", "embeddings.mask_token"),
    classifiers=("classifier.",),
    renamed=_RENAMED,
    library="transformers.models.vit.modeling_vit",
    output_class="ViTForImageClassification",
    module_prefix="vit.",
    since="5.10",
    tower_classes=("ViTForImageClassification", "ViTModel"),
    processors=("ViTImageProcessorPil", "ViTImageProcessor"),
    features=features,
    positions=lambda config: patches(config) + 1,
    blocks="encoder.layer",
    residuals=_RESIDUALS,
    classification=Classification("ViTForImageClassification", "vit", "vit.", features),
)
