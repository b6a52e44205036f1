"""Loading models with transformers: always in fp32, from safetensors, and never with a tensor missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_epimer.checkpoints.reader import StateDict, read_json
from hf_epimer.errors import CheckpointError
from hf_epimer.hub.refs import ModelRef
from hf_epimer.hub.words import one_line
from hf_epimer.lora import is_adapter, read_adapter
from hf_epimer.merging.finite import check_weights
from hf_epimer.models import find_architecture
from hf_epimer.models.architecture import Architecture, ZeroShot
from hf_epimer.models.linear import with_fast_products
from hf_epimer.models.memory import keep_freed_memory
from hf_epimer.models.source import (
    LARGEST_PROCESSOR,
    PROCESSOR_FILES,
    ModelSource,
    check_not_quantised,
    resolve_model,
)
from hf_epimer.models.weights import parameter_names, parameters_of, put_weights

if TYPE_CHECKING:
    from PIL.Image import Image


def load_tower(folder: str | Path, base: ModelSource | None = None) -> nn.Module:
    """The vision tower of a checkpoint, in fp32 and evaluation mode; a full model is read too.

    Args:
        folder: of a checkpoint, or of an adapter.
        base: of the adapter, which is folded into it.

    Raises:
        CheckpointError: of an unknown family, damaged, or a tensor is missing.
        MismatchError: it holds other tensors than its config.json promises.
    """
    keep_freed_memory()
    if base is not None and is_adapter([path.name for path in Path(folder).iterdir()]):
        return _load_adapted(Path(folder), base.folder_with_tokenizer())
    source = resolve_model(ModelRef(str(Path(folder).absolute())))
    weights = source.open(source.architecture.shapes(source.vision_config))
    tower = _empty_tower(source)
    names = parameter_names(tower, source.architecture)
    values = {
        # what is no part of the family's parameters (a pooler) is in no checkpoint for sure, and read by nobody
        name: weights.tensor(names[name]).float() if names.get(name) in weights.shapes else torch.zeros(parameter.shape)
        for name, parameter in tower.named_parameters()
    }
    for name, value in values.items():
        check_weights(value, str(folder), names.get(name, name))
    tower.load_state_dict(values, strict=False, assign=True)  # buffers stay as they were made
    return with_fast_products(tower.eval())


def load_full(folder: str | Path) -> tuple[nn.Module, ZeroShot]:
    """A complete base model (both towers and projections), in fp32, and what its parts are called.

    Raises:
        CheckpointError: as in `load_tower`, or its family has no text tower.
    """
    _, architecture = _described(Path(folder))
    zero_shot = architecture.zero_shot
    if zero_shot is None:
        raise CheckpointError(f"{folder}: a {architecture.name} has no text tower")
    model = _load(architecture, zero_shot.model_class, folder)
    for name, parameter in model.named_parameters():
        check_weights(parameter.detach(), str(folder), name)
    return model, zero_shot


def load_processor(folder: str | Path) -> Any:
    """A base's image preprocessing, without torchvision.

    Raises:
        CheckpointError: there is none, it cannot be read, or makes pictures of another size than the tower takes.
    """
    from PIL import Image

    folder = Path(folder)
    config, architecture = _described(folder)
    found = next((name for name in PROCESSOR_FILES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{folder}: there is no {PROCESSOR_FILES[0]}, which says how its pictures are prepared: save the image "
            "processor of the model that it comes from beside it, or name another base"
        )
    read_json(folder / found, str(folder), LARGEST_PROCESSOR)
    described = architecture.vision_config(config, str(folder))
    size = None if architecture.stretches else described.get("image_size")
    try:
        processor = processor_class(architecture).from_pretrained(folder)
        made = list(preprocess(processor, [Image.new("RGB", (64, 48))]).shape[-2:])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {found} describes no image processor: {one_line(error)}") from error
    if size is not None and made != [size, size]:
        raise CheckpointError(
            f"{folder}: {found} makes pictures of {made[0]} x {made[1]}, and the vision tower takes {size} x {size}"
        )
    return processor


def processor_class(architecture: Architecture) -> Any:
    """The class of a family's image processor that needs no torchvision."""
    import transformers

    return next(getattr(transformers, name) for name in architecture.processors if hasattr(transformers, name))


def preprocess(processor: Any, images: Sequence[Image]) -> Tensor:
    """Pictures as RGB through the image processor: [n, 3, h, w]."""
    from hf_epimer.tasks.decode import as_rgb

    pixels: Tensor = processor([as_rgb(image) for image in images], return_tensors="pt")["pixel_values"]
    return pixels


def _described(folder: Path) -> tuple[dict[str, Any], Architecture]:
    """A full model's config.json, and its family."""
    config = read_json(folder / "config.json", str(folder))
    check_not_quantised(config, str(folder))
    return config, find_architecture(config, str(folder))


def _load_adapted(adapter_folder: Path, folder_of_base: Path) -> nn.Module:
    """The vision tower of a base with an adapter folded into it."""
    tower, (_, architecture) = load_tower(folder_of_base), _described(folder_of_base)
    parameters = parameters_of(tower, architecture)
    adapter = read_adapter(adapter_folder, StateDict("base", parameters), architecture.canonical, quiet=True)
    put_weights({name: parameters[name] for name in adapter.changed}, adapter)
    return tower


def _empty_tower(source: ModelSource) -> nn.Module:
    """The tower that a checkpoint's config.json describes, without weights.

    `from_pretrained` finds the tensors of every layout in the newest transformers only; in older ones it would leave
    those whose names have no prefix as they were drawn.
    """
    from accelerate import init_empty_weights

    kind = getattr(import_module(source.architecture.library), source.architecture.output_class)
    described = source.architecture.section(source.config, str(source)) | {"id2label": {}, "label2id": {}}
    with init_empty_weights(include_buffers=False):
        tower: nn.Module = kind(kind.config_class.from_dict(described))
    return tower


def _load(architecture: Architecture, class_name: str, folder: str | Path) -> Any:
    """Load fp32 weights from safetensors and refuse a model of which a tensor is missing."""
    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    try:
        with _quiet():
            loaded: Any = getattr(import_module(architecture.library), class_name).from_pretrained(folder, **options)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {one_line(error)}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors of {class_name} are missing, first {missing[0]!r}")
    return with_fast_products(model.eval())


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no table of unused tensors while loading: the text tower is left out on purpose."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
