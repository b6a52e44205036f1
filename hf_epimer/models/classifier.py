"""A CLIP vision tower with a frozen zero-shot head.

With the tower f, the base's projection P [d, w] and one unit row t_c per class in the head T [classes, d]:

    z = P f(x) / |P f(x)|        t_c = unit(mean over templates of unit(text(template with class c)))
    logits_c = exp(logit_scale) * <z, t_c>

Only the tower's parameters are trained, merged or measured; P, T and logit_scale are the base model's own.
Loading fails when a tensor is missing, because transformers would only warn and go on with random weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPModel

from hf_epimer.errors import TaskError
from hf_epimer.lora import is_adapter
from hf_epimer.models.clip import CLIP_VISION
from hf_epimer.models.loading import load_adapted, load_base, load_processor, load_vision, preprocess


class Classifier(nn.Module):
    """Pixels [n, 3, h, w] to logits [n, classes]; `projection` is [d, w] and `head` is [classes, d]."""

    projection: Tensor
    head: Tensor
    scale: Tensor

    def __init__(
        self, vision: nn.Module, projection: Tensor, head: Tensor, logit_scale: Tensor, processor: Any
    ) -> None:
        super().__init__()
        if head.shape[1] != projection.shape[0]:
            raise TaskError(f"the head has rows of {head.shape[1]} numbers, the base projects to {projection.shape[0]}")
        self.vision = vision
        self.processor = processor
        self.register_buffer("projection", projection.detach().clone())
        self.register_buffer("head", normalize(head.detach(), dim=-1))
        self.register_buffer("scale", logit_scale.detach().exp())

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = self.vision(pixel_values=pixels).pooler_output
        return self.scale * normalize(pooled @ self.projection.T, dim=-1) @ self.head.T

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any mode and size as the tower's input, on the tower's device and in its precision."""
        return preprocess(self.processor, images).to(self.projection)

    def vision_names(self) -> dict[str, str]:
        """Name of each of the tower's parameters in this module -> the name it has on disk, with its prefix."""
        own = [name for name, _ in self.vision.named_parameters()]
        return {f"vision.{name}": CLIP_VISION.prefix + name.removeprefix(CLIP_VISION.prefix) for name in own}

    def vision_parameters(self) -> dict[str, nn.Parameter]:
        """The tower's parameters under the names they have on disk, whatever the installed transformers calls them."""
        return {name: self.get_parameter(own) for own, name in self.vision_names().items()}


def load_classifier(vision_folder: str | Path, base_folder: str | Path, head: Tensor) -> Classifier:
    """The tower of one checkpoint or adapter behind the head and the projection of its base, ready to be evaluated."""
    base = load_base(base_folder)
    adapted = is_adapter([path.name for path in Path(vision_folder).iterdir()])
    vision = load_adapted(vision_folder, base_folder) if adapted else load_vision(vision_folder)
    return classifier_of(vision, base, head, load_processor(base_folder))


def classifier_of(vision: nn.Module, base: CLIPModel, head: Tensor, processor: Any) -> Classifier:
    """A classifier from parts in memory."""
    return Classifier(vision, base.visual_projection.weight, head, base.logit_scale, processor).eval()
