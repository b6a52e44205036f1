"""DeiT: a ViT with a second token for distillation; classified by a linear layer on the class token.

(A DeiT without that token is a ViT to transformers.) A model "with teacher" averages two classifiers and cannot be
trained by transformers; its tower serves as a base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_epimer.models import vit
from hf_epimer.models.architecture import Classification
from hf_epimer.types import Shape


def _parameters(config: Mapping[str, Any]) -> dict[str, Shape]:
    distillation: dict[str, Shape] = {"embeddings.distillation_token": (1, 1, config["hidden_size"])}
    return vit.embedding_parameters(config, tokens=2) | distillation | vit.block_parameters(config)


DEIT = replace(
    vit.VIT,
    name="DeiT",
    tag="deit",
    model_types={"deit": None},
    parameters=_parameters,
    prefix="deit.",
    nested=("deit.",),
    classifiers=("classifier.", "cls_classifier.", "distillation_classifier."),
    library="transformers.models.deit.modeling_deit",
    output_class="DeiTForImageClassification",
    module_prefix="deit.",
    tower_classes=("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher", "DeiTModel"),
    processors=("DeiTImageProcessorPil", "DeiTImageProcessor"),
    positions=lambda config: vit.patches(config) + 2,
    classification=Classification("DeiTForImageClassification", "deit", "deit.", vit.features),
)
