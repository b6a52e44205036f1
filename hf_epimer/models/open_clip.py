"""OpenCLIP's checkpoints as transformers' CLIPModel: other names, queries, keys and values in one matrix, projections
transposed.

    visual.transformer.resblocks.0.attn.in_proj_weight    [3 w, w]
    vision_model.encoder.layers.0.self_attn.q_proj.weight [w, w], and the same of k_proj and v_proj

    visual.proj [w, d]    visual_projection.weight [d, w]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_epimer.errors import CheckpointError
from hf_epimer.types import Shape

_WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_OF_A_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TRANSPOSED = ("visual.proj", "text_projection")
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_FUSED = re.compile(r"attn\.in_proj_(weight|bias)")
_BUFFERS = ("attn_mask", "logit_bias_mask")


def converted_names(stored: str) -> tuple[str, ...]:
    """What a tensor is called in a CLIPModel: one name, three for a fused projection, none for a buffer.

    Raises:
        CheckpointError: a CLIPModel has nothing like it.
    """
    name = stored.removeprefix("text.")  # some models have their text tower in an object of its own
    if name in _BUFFERS:
        return ()
    if name in _WHOLE:
        return (_WHOLE[name],)
    module, _, parameter = name.rpartition(".")
    if module in _NORMS:
        return (f"{_NORMS[module]}.{parameter}",)
    if block := _BLOCK.fullmatch(name):
        inside = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}."
        if fused := _FUSED.fullmatch(block[3]):
            return tuple(f"{inside}self_attn.{part}_proj.{fused[1]}" for part in "qkv")
        module, _, parameter = block[3].rpartition(".")
        if module in _OF_A_BLOCK:
            return (f"{inside}{_OF_A_BLOCK[module]}.{parameter}",)
    raise CheckpointError(
        f"{stored}: transformers' CLIPModel has no such tensor; this OpenCLIP model is of another kind"
    )


def converted(stored: str, values: Tensor) -> dict[str, Tensor]:
    """A tensor as those of a CLIPModel.

    Raises:
        CheckpointError: as in `converted_names`.
    """
    names = converted_names(stored)
    if not names:
        return {}
    parts = values.chunk(len(names)) if len(names) > 1 else (values,)
    transposed = stored.removeprefix("text.") in _TRANSPOSED
    return {name: part.T.contiguous() if transposed else part for name, part in zip(names, parts, strict=True)}


def converted_shapes(stored: str, shape: Shape) -> dict[str, Shape]:
    """The shapes of what `converted` gives."""
    names = converted_names(stored)
    if len(names) > 1:
        shape = (shape[0] // len(names), *shape[1:])
    return {name: shape[::-1] if stored.removeprefix("text.") in _TRANSPOSED else shape for name in names}


def converted_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config.json of a CLIPModel, from open_clip_config.json.

    Raises:
        CheckpointError: it describes no CLIP whose vision tower is a vision transformer.
    """
    try:
        model = config["model_cfg"]
        vision, text, size = model["vision_cfg"], model["text_cfg"], int(model["embed_dim"])
        act = "quick_gelu" if model.get("quick_gelu") else "gelu"
        width, words = int(vision["width"]), int(text["vocab_size"])
        of_both: dict[str, Any] = {"hidden_act": act, "layer_norm_eps": 1e-5, "projection_dim": size}
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": size,
            "vision_config": of_both
            | {
                "hidden_size": width,
                "intermediate_size": int(width * float(vision.get("mlp_ratio", 4))),
                "num_hidden_layers": int(vision["layers"]),
                "num_attention_heads": width // int(vision.get("head_width", 64)),
                "image_size": int(vision["image_size"]),
                "patch_size": int(vision["patch_size"]),
            },
            "text_config": of_both
            | {
                "hidden_size": int(text["width"]),
                "intermediate_size": int(text["width"] * float(text.get("mlp_ratio", 4))),
                "num_hidden_layers": int(text["layers"]),
                "num_attention_heads": int(text["heads"]),
                "max_position_embeddings": int(text["context_length"]),
                "vocab_size": words,
                "bos_token_id": words - 2,
                "eos_token_id": words - 1,
            },
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: it describes no CLIP with a vision transformer ({error!r})") from error


def converted_processor(config: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json, from open_clip_config.json: the shorter side to the tower's size, and its middle."""
    model, how = config["model_cfg"], config.get("preprocess_cfg") or {}
    side = int(model["vision_cfg"]["image_size"])
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": how.get("mean") or [0.48145466, 0.4578275, 0.40821073],
        "image_std": how.get("std") or [0.26862954, 0.26130258, 0.27577711],
    }
