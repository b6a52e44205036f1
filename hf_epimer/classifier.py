"""A CLIP vision tower with a frozen zero-shot head.

With the tower f, the base's projection P [d, w] and one unit row t_c per class in the head T [classes, d]:

    z = P f(x) / |P f(x)|        t_c = unit(mean over templates of unit(text(template with class c)))
    logits_c = exp(logit_scale) * <z, t_c>

Only the tower's parameters are trained, merged or measured; P, T and logit_scale are the base model's own.
Loading fails when a tensor is missing, because transformers would only warn and go on with random weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModel, PreTrainedModel
from transformers.utils import logging

try:
    from transformers import CLIPImageProcessorPil as ImageProcessor
except ImportError:  # before it existed, the plain name was the one that needs no torchvision
    from transformers import CLIPImageProcessor as ImageProcessor  # type: ignore[assignment]

from hf_epimer.architectures import CLIP_VISION
from hf_epimer.checkpoints import StateDict
from hf_epimer.errors import CheckpointError, TaskError
from hf_epimer.lora import is_adapter, read_adapter
from hf_epimer.tasks import Task

PREFIX = "vision_model."


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
        return {f"vision.{name}": PREFIX + name.removeprefix(PREFIX) for name in own}

    def vision_parameters(self) -> dict[str, nn.Parameter]:
        """The tower's parameters under the names they have on disk, whatever the installed transformers calls them."""
        return {name: self.get_parameter(own) for own, name in self.vision_names().items()}


def preprocess(processor: Any, images: Sequence[Image.Image]) -> Tensor:
    """Pictures as RGB through the image processor: [n, 3, h, w]."""
    return processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]


def load_base(folder: str | Path) -> CLIPModel:
    """The complete base model (both towers and projections), in fp32."""
    return _load(CLIPModel, folder)


def load_vision(folder: str | Path) -> CLIPVisionModel:
    """The vision tower of a checkpoint, in fp32; a full CLIP model is read too."""
    return _load(CLIPVisionModel, folder)


def load_adapted(adapter_folder: str | Path, base_folder: str | Path) -> CLIPVisionModel:
    """The vision tower of a base with an adapter folded into it, in fp32."""
    vision = load_vision(base_folder)
    weights = {PREFIX + name.removeprefix(PREFIX): weight.data for name, weight in vision.named_parameters()}
    adapter = read_adapter(Path(adapter_folder), StateDict("base", weights), CLIP_VISION.canonical, quiet=True)
    for name in adapter.changed:
        weights[name].copy_(adapter.tensor(name))
    return vision


def load_processor(base_folder: str | Path) -> Any:
    """The base's image preprocessing, without torchvision."""
    return ImageProcessor.from_pretrained(base_folder)


def load_classifier(vision_folder: str | Path, base_folder: str | Path, head: Tensor) -> Classifier:
    """The tower of one checkpoint or adapter behind the head and the projection of its base, ready to be evaluated."""
    base = load_base(base_folder)
    adapted = is_adapter([path.name for path in Path(vision_folder).iterdir()])
    vision = load_adapted(vision_folder, base_folder) if adapted else load_vision(vision_folder)
    return classifier_of(vision, base, head, load_processor(base_folder))


def classifier_of(vision: nn.Module, base: CLIPModel, head: Tensor, processor: Any) -> Classifier:
    """A classifier from parts in memory."""
    return Classifier(vision, base.visual_projection.weight, head, base.logit_scale, processor).eval()


def zero_shot_head(base_folder: str | Path, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One unit row per class from the base's text tower: [classes, projection_dim]."""
    return text_head(load_base(base_folder), AutoTokenizer.from_pretrained(base_folder), class_names, templates)


@torch.no_grad()
def text_head(base: CLIPModel, tokenizer: Any, class_names: Iterable[str], templates: Sequence[str]) -> Tensor:
    """The zero-shot head of a base model that is already in memory."""
    rows = []
    for name in class_names:
        prompts = [template.replace("{}", name) for template in templates]
        each = normalize(embed_texts(base, tokenizer, prompts), dim=-1)
        rows.append(normalize(each.mean(0), dim=-1))
    return torch.stack(rows)


def embed_texts(base: CLIPModel, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Projected text features, not normalised: [n, d]. (get_text_features returns another type in each release.)"""
    tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(base.device)
    return base.text_projection(base.text_model(**tokens).pooler_output)


def task_head(task: Task, base_folder: str | Path, class_names: Sequence[str]) -> Tensor:
    """The task's own head file if it has one, else the zero-shot head for these class names."""
    if task.head is None:
        return zero_shot_head(base_folder, class_names, task.templates)
    return own_head(task, class_names)


def own_head(task: Task, class_names: Sequence[str]) -> Tensor:
    """The head that the task names: [classes, projection_dim].

    Raises:
        TaskError: the file cannot be read, or does not fit.
    """
    assert task.head is not None
    head = _read_head(task.head)
    if len(head) != len(class_names):
        raise TaskError(f"{task.head}: {len(head)} rows for the {len(class_names)} classes of {task.name!r}")
    return head


def _read_head(path: str) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TaskError(f"{path}: cannot be read as the head of a task: {error}") from error
    if "weight" not in tensors or tensors["weight"].ndim != 2:
        raise TaskError(f"{path}: a head is a tensor 'weight' [classes, projection_dim]; found {sorted(tensors)}")
    return tensors["weight"].float()


def _load(kind: type[PreTrainedModel], folder: str | Path) -> Any:
    """Load fp32 weights from safetensors and refuse a model of which any tensor is missing."""
    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    with _quiet():
        loaded: Any = kind.from_pretrained(folder, **options)
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors of {kind.__name__} are missing, first {missing[0]!r}")
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no table of unused tensors while loading: the text tower is left out on purpose."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
