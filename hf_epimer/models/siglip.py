"""SigLIP, and SigLIP 2 at a fixed resolution: no class token, a pooling head that attends with a learned probe.

Its zero-shot head compares what the pooling head gives with the text tower's output, neither projected; its classifier
reads the mean of the patches instead. (SigLIP 2 at native resolutions, `siglip2` in config.json, takes cut pictures of
any shape and is merged as any other architecture, without data.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_epimer.models import vit
from hf_epimer.models.architecture import Architecture, Classification, ZeroShot
from hf_epimer.models.clip import RESIDUALS, block_parameters
from hf_epimer.types import Shape

if TYPE_CHECKING:
    from torch import Tensor


def _parameters(config: Mapping[str, Any]) -> dict[str, Shape]:
    width, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    return {
        "embeddings.patch_embedding.weight": (width, config["num_channels"], patch, patch),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (vit.patches(config), width),
        **block_parameters(config),
        "post_layernorm.weight": (width,),
        "post_layernorm.bias": (width,),
        "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width),
        "head.attention.in_proj_bias": (3 * width,),
        "head.attention.out_proj.weight": (width, width),
        "head.attention.out_proj.bias": (width,),
        "head.layernorm.weight": (width,),
        "head.layernorm.bias": (width,),
        "head.mlp.fc1.weight": (inner, width),
        "head.mlp.fc1.bias": (inner,),
        "head.mlp.fc2.weight": (width, inner),
        "head.mlp.fc2.bias": (width,),
    }


def _pooled(tower: Any, pixels: Tensor) -> Tensor:
    """What the pooling head gives, by its parts: as a whole it does not take a copy of its probe for every sample."""
    inside = getattr(tower, "vision_model", tower)  # where it lies before transformers 5.6
    blocks = inside.encoder(inputs_embeds=inside.embeddings(pixels))
    hidden = inside.post_layernorm(blocks.last_hidden_state)
    head = inside.head
    attended = head.attention(head.probe.expand(len(hidden), -1, -1), hidden, hidden)[0]
    pooled: Tensor = attended + head.mlp(head.layernorm(attended))
    return pooled[:, 0]


def _mean_of_patches(tower: Any, pixels: Tensor) -> Tensor:
    mean: Tensor = tower(pixel_values=pixels).last_hidden_state.mean(1)
    return mean


def _embed(model: Any, tokens: Any) -> Tensor:
    """Of padded texts as in its training: no mask."""
    embedded: Tensor = model.text_model(input_ids=tokens["input_ids"]).pooler_output
    return embedded


SIGLIP = Architecture(
    name="SigLIP vision model",
    tag="siglip",
    model_types={"siglip_vision_model": None, "siglip": "vision_config"},
    fields=vit.SIZES | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True},
    unsupported={"vision_use_head": False},
    parameters=_parameters,
    prefix="vision_model.",
    nested=("vision_model.", "vision_tower.", "siglip.", "model."),
    roots=("embeddings", "encoder", "post_layernorm", "head"),
    ignored=("text_model.", "logit_scale", "logit_bias", "embeddings.position_ids"),
    classifiers=("classifier.",),
    library="transformers.models.siglip.modeling_siglip",
    output_class="SiglipVisionModel",
    since="5.6",
    tower_classes=("SiglipVisionModel",),
    processors=("SiglipImageProcessorPil", "SiglipImageProcessor"),
    features=_pooled,
    positions=vit.patches,
    blocks="encoder.layers",
    residuals=RESIDUALS,
    zero_shot=ZeroShot(
        model_types=("siglip",),
        model_class="SiglipModel",
        vision="vision_model",
        files=frozenset(
            {
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "added_tokens.json",
                "spiece.model",
                "tokenizer.model",
            }
        ),
        tokenizers=(frozenset({"tokenizer.json"}), frozenset({"spiece.model"}), frozenset({"tokenizer.model"})),
        tokenizer_classes=("SiglipTokenizer", "Siglip2Tokenizer", "GemmaTokenizer", "GemmaTokenizerFast"),
        projection=None,
        logit_scale="logit_scale",
        embed=_embed,
        is_padded=True,
    ),
    classification=Classification(
        "SiglipForImageClassification",
        "siglip_vision_model",
        "",
        _mean_of_patches,
        trunk_class="SiglipVisionModel",
        attribute="last_hidden_state.mean(1)",
        unread=("head.",),
    ),
)
