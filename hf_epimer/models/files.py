"""What merging, measuring and evaluating do alike with resolved references: files, base, architecture.

Nothing here reads a weight; `open_checkpoint` reads the headers of weight files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_epimer.checkpoints.reader import FORMATS, WEIGHTS_INDEX, Checkpoint, choose_weights, read_json
from hf_epimer.errors import CheckpointError
from hf_epimer.hub.source import Source
from hf_epimer.lora import adapter as adapters
from hf_epimer.merging.inputs import check_shapes
from hf_epimer.models import find_architecture
from hf_epimer.models.architecture import Architecture
from hf_epimer.types import Shape

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def is_adapter(source: Source) -> bool:
    """Whether it is a PEFT adapter, which has no config.json of its own and needs its base."""
    return adapters.is_adapter(source.files)


def adapter_config(source: Source) -> dict[str, Any]:
    """An adapter's adapter_config.json.

    Raises:
        CheckpointError: it is no JSON object, or of a kind that cannot be merged (DoRA and others).
    """
    config = read_json(source.fetch(adapters.ADAPTER_CONFIG), str(source))
    adapters.check_config(config, str(source))
    return config


def weight_names(source: Source) -> list[str]:
    """The names of a checkpoint's weight files; an adapter's config is one of them, for its scale is in it.

    Raises:
        CheckpointError: it has none that may be read.
    """
    if is_adapter(source):
        return [adapters.ADAPTER_CONFIG, adapters.adapter_weights(source.files, str(source))]
    return choose_weights(source.files, str(source), lambda: source.read_text(WEIGHTS_INDEX), source.elsewhere)


def config_of(source: Source) -> dict[str, Any]:
    """Its config.json.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    if "config.json" not in source.files:
        raise CheckpointError(f"{source}: there is no config.json")
    return read_json(source.fetch("config.json"), str(source))


def architecture_of(source: Source) -> Architecture:
    """The family of a checkpoint; an adapter's is that of its base.

    Raises:
        CheckpointError: it has no config, or is of no family that is known here.
    """
    return find_architecture(config_of(source), str(source))


def vision_config_of(source: Source) -> dict[str, Any]:
    """The fields of its config that decide with what it can be merged."""
    return architecture_of(source).vision_config(config_of(source), str(source))


def has_text_tower(base: Source) -> bool:
    """Whether a base is a full model that a zero-shot head can be made from."""
    zero_shot = architecture_of(base).zero_shot
    return zero_shot is not None and config_of(base).get("model_type") in zero_shot.model_types


def model_folder(source: Source) -> Path:
    """The folder of a checkpoint or adapter with its config and weights fetched."""
    paths = [source.fetch(name) for name in weight_names(source)]
    return paths[0].parent if is_adapter(source) else source.fetch("config.json").parent


def base_folder(source: Source) -> Path:
    """The folder of a base with its weights, tokenizer and image processor fetched."""
    zero_shot = architecture_of(source).zero_shot
    for name in {*PROCESSOR_FILES, *(zero_shot.files if zero_shot else ())} & source.files:
        source.fetch(name)
    return model_folder(source)


def processor_folder(source: Source) -> Path:
    """The folder of a base with its image processor fetched, and no weights."""
    for name in {*PROCESSOR_FILES} & source.files:
        source.fetch(name)
    return source.fetch("config.json").parent


def open_checkpoint(source: Source, architecture: Architecture, shapes: Mapping[str, Shape]) -> Checkpoint:
    """A full checkpoint, fetched, its names, shapes and types compared with what the base's config promises.

    Raises:
        MismatchError: something is missing, extra or shaped differently.
        CheckpointError: it is quantised, truncated or corrupt.
    """
    paths = [source.fetch(name) for name in weight_names(source)]
    checkpoint = Checkpoint(source.label, paths, architecture.canonical)
    check_shapes(shapes, checkpoint, "the checkpoint")
    strange = {dtype for name, dtype in checkpoint.dtypes.items() if name in shapes} - set(FORMATS.values())
    if strange:
        raise CheckpointError(
            f"{checkpoint.label}: its weights are stored as {', '.join(sorted(strange))}; only float32, float16 and "
            "bfloat16 can be merged (dequantise it first)"
        )
    return checkpoint


def content_sha(source: Source) -> str:
    """What pins a checkpoint's weights: its commit on the Hub, or the sha256 of a local folder's weight files."""
    if not source.ref.is_local:
        return str(source.ref.revision)
    digest = hashlib.sha256()
    for name in weight_names(source):
        with open(source.fetch(name), "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
