"""DINOv2, without and with registers: LayerScale in every block, positions that are stretched to the picture's size.

Its classifier reads the class token beside the mean of the patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_epimer.models import vit
from hf_epimer.models.architecture import Architecture, Classification, Residual
from hf_epimer.types import Shape

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = {name: default for name, default in vit.FIELDS.items() if name != "intermediate_size"} | {
    "mlp_ratio": 4,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "use_swiglu_ffn": False,
}


def _parameters(config: Mapping[str, Any]) -> dict[str, Shape]:
    width = config["hidden_size"]
    inner = width * config["mlp_ratio"]
    shapes = vit.embedding_parameters(config, tokens=1)
    if config.get("use_mask_token", True):  # with registers there is always one
        shapes["embeddings.mask_token"] = (1, width)
    if "num_register_tokens" in config:
        shapes["embeddings.register_tokens"] = (1, config["num_register_tokens"], width)
    for index in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{index}."
        shapes |= dict(vit.attention_parameters(config, block))
        for part, shape in (("fc1", (inner, width)), ("fc2", (width, inner))):
            shapes |= {f"{block}mlp.{part}.weight": shape, f"{block}mlp.{part}.bias": shape[:1]}
        for number in (1, 2):
            shapes |= {f"{block}norm{number}.weight": (width,), f"{block}norm{number}.bias": (width,)}
            shapes[f"{block}layer_scale{number}.lambda1"] = (width,)
    return shapes | {"layernorm.weight": (width,), "layernorm.bias": (width,)}


def _features(tower: Any, pixels: Tensor) -> Tensor:
    with _stretched_each(tower.base_model.embeddings):
        return vit.features(tower, pixels)


@contextmanager
def _stretched_each(embeddings: Any) -> Iterator[None]:
    """Let positions be stretched that have a copy for every sample (per-sample gradients): transformers takes one."""
    embeddings.interpolate_pos_encoding = partial(_stretched, embeddings)
    try:
        yield
    finally:
        del embeddings.interpolate_pos_encoding


def _stretched(embeddings: Any, *arguments: Any) -> Tensor:
    import torch

    stretch = type(embeddings).interpolate_pos_encoding
    return torch.cat([stretch(_With(embeddings, one[None]), *arguments) for one in embeddings.position_embeddings])


class _With:
    """A module with other position embeddings."""

    def __init__(self, module: Any, position_embeddings: Tensor) -> None:
        self._module = module
        self.position_embeddings = position_embeddings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _attention(block: Any, hidden: Tensor) -> Tensor:
    change: Tensor = block.layer_scale1(vit.attended(block.attention, block.norm1(hidden)))
    return hidden + change


def mlp(block: Any, hidden: Tensor) -> Tensor:
    """The second sum of a block, DINOv3's too."""
    change: Tensor = block.layer_scale2(block.mlp(block.norm2(hidden)))
    return hidden + change


DINOV2 = Architecture(
    name="DINOv2",
    tag="dinov2",
    model_types={"dinov2": None},
    fields=_FIELDS | {"use_mask_token": True},
    unsupported={"use_swiglu_ffn": True},  # its layers are cut in memory in another way than in files
    parameters=_parameters,
    prefix="dinov2.",
    nested=("dinov2.",),
    roots=("embeddings", "encoder", "layernorm"),
    classifiers=("classifier.",),
    unread=("embeddings.mask_token",),
    renamed=vit.ATTENTION_RENAMED,
    library="transformers.models.dinov2.modeling_dinov2",
    output_class="Dinov2ForImageClassification",
    module_prefix="dinov2.",
    since="5.10",
    tower_classes=("Dinov2ForImageClassification", "Dinov2Model"),
    processors=("BitImageProcessorPil", "BitImageProcessor"),
    features=_features,
    positions=lambda config: vit.patches(config) + 1 + config.get("num_register_tokens", 0),
    stretches=True,
    blocks="encoder.layer",
    residuals=(
        Residual(
            _attention,
            reads=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
            writes="attention.output.dense",
            scale="layer_scale1.lambda1",
        ),
        Residual(mlp, reads=("mlp.fc1",), writes="mlp.fc2", scale="layer_scale2.lambda1"),
    ),
    known={
        (384, 12, 14, 518): "facebook/dinov2-small",
        (768, 12, 14, 518): "facebook/dinov2-base",
        (1024, 24, 14, 518): "facebook/dinov2-large",
    },
    known_by=("hidden_size", "num_hidden_layers", "patch_size", "image_size"),
    classification=Classification("Dinov2ForImageClassification", "dinov2", "dinov2.", _features, parts=2),
)

DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    name="DINOv2 with registers",
    tag="dinov2_with_registers",
    model_types={"dinov2_with_registers": None},
    fields=_FIELDS | {"num_register_tokens": 4},
    prefix="dinov2_with_registers.",
    nested=("dinov2_with_registers.",),
    library="transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",
    output_class="Dinov2WithRegistersForImageClassification",
    module_prefix="dinov2_with_registers.",
    tower_classes=("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersModel"),
    known={
        (384, 12, 14, 518): "facebook/dinov2-with-registers-small",
        (768, 12, 14, 518): "facebook/dinov2-with-registers-base",
        (1024, 24, 14, 518): "facebook/dinov2-with-registers-large",
    },
    classification=Classification(
        "Dinov2WithRegistersForImageClassification",
        "dinov2_with_registers",
        "dinov2_with_registers.",
        _features,
        parts=2,
    ),
)
