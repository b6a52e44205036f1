"""Loading models with transformers: always in fp32, from safetensors, and never with a tensor missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel, CLIPVisionModel, PreTrainedModel
from transformers.utils import logging

from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.errors import CheckpointError
from hf_epimer.hub.source import Source
from hf_epimer.lora import is_adapter, read_adapter
from hf_epimer.models.clip import CLIP_VISION
from hf_epimer.models.files import base_folder

try:
    from transformers import CLIPImageProcessorPil as ImageProcessor
except ImportError:  # before it existed, the plain name was the one that needs no torchvision
    from transformers import CLIPImageProcessor as ImageProcessor  # type: ignore[assignment]


def preprocess(processor: Any, images: Sequence[Image.Image]) -> Tensor:
    """Pictures as RGB through the image processor: [n, 3, h, w]."""
    return processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]


def load_base(folder: str | Path) -> CLIPModel:
    """The complete base model (both towers and projections), in fp32."""
    return _load(CLIPModel, folder)


def load_vision(folder: str | Path) -> CLIPVisionModel:
    """The vision tower of a checkpoint, in fp32; a full CLIP model is read too."""
    return _load(CLIPVisionModel, folder)


def load_adapted(adapter_folder: str | Path, folder_of_base: str | Path) -> CLIPVisionModel:
    """The vision tower of a base with an adapter folded into it, in fp32."""
    vision = load_vision(folder_of_base)
    weights = {
        CLIP_VISION.prefix + name.removeprefix(CLIP_VISION.prefix): weight.data
        for name, weight in vision.named_parameters()
    }
    adapter = read_adapter(Path(adapter_folder), StateDict("base", weights), CLIP_VISION.canonical, quiet=True)
    for name in adapter.changed:
        weights[name].copy_(adapter.tensor(name))
    return vision


def load_processor(base_folder: str | Path) -> Any:
    """The base's image preprocessing, without torchvision."""
    return ImageProcessor.from_pretrained(base_folder)


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


def load_tower(folder: str | Path, base: Source) -> nn.Module:
    """The vision tower of a checkpoint, or of a base with an adapter folded into it."""
    if is_adapter([path.name for path in Path(folder).iterdir()]):
        return load_adapted(folder, base_folder(base))
    return load_vision(folder)
