"""A vision tower with a frozen head. With the tower f, zero-shot or linear:

    z = P f(x) / |P f(x)|        t_c = unit(mean over templates of unit(text(template with class c)))
    logits_c = exp(logit_scale) * <z, t_c>

    logits = W f(x) + b          for models that were trained with a classifier, and families without a text tower

Only the tower's parameters are trained, merged or measured; P [d, w] and logit_scale are the base model's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from hf_epimer.errors import NumericalError, TaskError
from hf_epimer.merging.finite import is_finite
from hf_epimer.models.architecture import Architecture
from hf_epimer.models.loading import preprocess
from hf_epimer.models.transfer import sent
from hf_epimer.models.weights import parameter_names, parameters_of
from hf_epimer.types import Precision

if TYPE_CHECKING:
    from PIL.Image import Image


class ZeroShotHead(nn.Module):
    """Features [n, w] to logits [n, classes], by cosines; `projection` is [d, w] and `rows` [classes, d]."""

    projection: Tensor
    rows: Tensor
    scale: Tensor
    is_trained = False

    def __init__(self, projection: Tensor, rows: Tensor, logit_scale: Tensor) -> None:
        super().__init__()
        if rows.shape[1] != projection.shape[0]:
            raise TaskError(f"the head has rows of {rows.shape[1]} numbers, the base projects to {projection.shape[0]}")
        self.register_buffer("projection", projection.detach().clone())
        self.register_buffer("rows", normalize(rows.detach(), dim=-1))
        self.register_buffer("scale", logit_scale.detach().exp())

    @property
    def classes(self) -> int:
        """How many."""
        return len(self.rows)

    @property
    def weight(self) -> Tensor:
        """What the embedded features are multiplied with: [classes, d]."""
        return self.scale * self.rows

    def embed(self, features: Tensor) -> Tensor:
        """What is compared with the rows: [n, d], each of norm 1."""
        return normalize(features @ self.projection.T, dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * self.embed(features) @ self.rows.T


class LinearHead(nn.Module):
    """Features [n, d] to logits [n, classes]; `weight` is [classes, d] and `bias` [classes].

    Args:
        is_trained: whether it is a model's own classifier, which may read other features than other heads do.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, *, is_trained: bool = False) -> None:
        super().__init__()
        self.is_trained = is_trained
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", bias.detach().clone())

    @property
    def classes(self) -> int:
        """How many."""
        return len(self.weight)

    def embed(self, features: Tensor) -> Tensor:
        """What the weight is applied to: the features."""
        return features

    def forward(self, features: Tensor) -> Tensor:
        return linear(features, self.weight, self.bias)


Head = ZeroShotHead | LinearHead


UNSURE = 2 * 2.0**-8
"""Of a margin: twice the precision of bfloat16. Where it is larger, float32 guesses the same (docs/benchmarks.md)."""


class Classifier(nn.Module):
    """Pixels [n, 3, h, w] to logits [n, classes]."""

    def __init__(self, tower: nn.Module, architecture: Architecture, head: Head, processor: Any) -> None:
        super().__init__()
        self.tower = tower
        self.architecture = architecture
        self.head = head
        self.processor = processor

    @property
    def classes(self) -> int:
        """How many the head tells apart."""
        return self.head.classes

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self._features(pixels))
        return logits

    @torch.inference_mode()
    def top1(self, pixels: Tensor, precision: Precision = "no") -> Tensor:
        """The number of the most probable class of every picture, [n] on the CPU.

        Args:
            precision: of the tower's products; with bf16, pictures whose class it leaves in doubt (`UNSURE`) are looked
                at again in float32.

        Raises:
            NumericalError: a logit is NaN or Inf, and no class is.
        """
        if precision == "no":
            logits: Tensor = self(pixels)
        else:
            with torch.autocast(next(self.tower.parameters()).device.type, torch.bfloat16):
                features = self._features(pixels).float()
            logits = self.head(features)
            unsure = margin(self.head, features) < UNSURE
            if unsure.any():
                logits[unsure] = self(pixels[unsure.to(pixels.device)])
        if not is_finite(logits):
            raise NumericalError("NaN or Inf in the logits of some pictures; are the image processor's settings right?")
        return logits.argmax(-1).cpu()

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """Pictures of any mode and size as the tower's input, on the CPU."""
        return preprocess(self.processor, images)

    def _features(self, pixels: Tensor) -> Tensor:
        """What the head reads, [n, w]."""
        features = self.architecture.features_for(by_classifier=self.head.is_trained)
        weight = next(self.tower.parameters())
        return features(self.tower, sent(pixels, weight.device).to(weight.dtype))

    def with_tower(self, tower: nn.Module) -> Classifier:
        """Another tower of the same shape behind the same head."""
        return Classifier(tower, self.architecture, self.head, self.processor).eval()

    def tower_names(self) -> dict[str, str]:
        """Name of each of the tower's parameters in this module -> its canonical name."""
        names = parameter_names(self.tower, self.architecture)
        return {f"tower.{name}": canonical for name, canonical in names.items()}

    def unread(self) -> frozenset[str]:
        """Canonical names of the tower's parameters that the logits do not depend on."""
        return self.architecture.unread_among(self.tower_names().values(), by_classifier=self.head.is_trained)

    def tower_parameters(self) -> dict[str, nn.Parameter]:
        """Canonical name -> parameter of the tower."""
        return parameters_of(self.tower, self.architecture)


def margin(head: Head, features: Tensor) -> Tensor:
    """How far features are from the nearest border of their likeliest class, relative to their norm: [n].

    min over c of (l_1 - l_c) / (|w_1 - w_c| |e|)     with logits l = W e + b of embedded features e

    That need not be the border of the second likeliest: rows may differ in length.
    """
    logits, embedded = head(features), head.embed(features)
    best = logits.max(dim=-1, keepdim=True)
    # by differences: what products would leave of a row's distance from itself is not 0
    distances = torch.cdist(head.weight, head.weight, compute_mode="donot_use_mm_for_euclid_dist")
    apart = distances[best.indices.squeeze(-1)]
    away = torch.where(apart > 0, (best.values - logits) / apart, math.inf)  # classes of one row have no border
    return away.amin(-1) / embedded.norm(dim=-1)
