"""What merging, measuring and evaluating do alike with resolved references: files, base, architecture.

Nothing here reads a weight.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_epimer import hub
from hf_epimer.architectures import CLIP_VISION
from hf_epimer.card import base_from_cards
from hf_epimer.checkpoints import WEIGHTS_INDEX, choose_weights, read_json
from hf_epimer.config import ModelRef
from hf_epimer.errors import CheckpointError, MismatchError, UsageError
from hf_epimer.hub import Source

logger = logging.getLogger(__name__)

TEXT_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"}
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def weight_names(source: Source) -> list[str]:
    """The names of a checkpoint's weight files.

    Raises:
        CheckpointError: it has none that may be read.
    """
    return choose_weights(source.files, str(source), lambda: source.read_text(WEIGHTS_INDEX))


def config_of(source: Source) -> dict[str, Any]:
    """Its config.json.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    if "config.json" not in source.files:
        raise CheckpointError(f"{source}: there is no config.json")
    return read_json(source.fetch("config.json"), str(source))


def tower_of(source: Source) -> dict[str, Any]:
    """The fields of its config that decide with what it can be merged."""
    return CLIP_VISION.tower_config(config_of(source), str(source))


def find_base(
    given: ModelRef | None,
    models: Sequence[Source],
    cards: Sequence[dict[str, Any]],
    towers: Sequence[dict[str, Any]],
) -> Source:
    """The common base: as given, else as the model cards say, else by the shape of a well-known model.

    Raises:
        MismatchError: the cards disagree.
        UsageError: there is nothing to go by.
    """
    if given is not None:
        return hub.resolve(given)
    ref, why = base_from_cards(list(zip(models, cards, strict=True)))
    if ref is not None:
        return hub.resolve(ref)
    if why.startswith("the model cards disagree"):
        raise MismatchError(f"{why}; name the right one with --base")
    known = CLIP_VISION.known_base(towers[0])
    if known is None:
        raise UsageError(f"{why} and {models[0]} is not shaped like a well-known CLIP model: name the base with --base")
    logger.info("base %s, by the shape of %s", known, models[0])
    return hub.resolve(ModelRef(known))


def check_towers(
    base: Source, tower: dict[str, Any], models: Sequence[Source], towers: Sequence[dict[str, Any]]
) -> None:
    """Refuse models of another architecture than the base.

    Raises:
        MismatchError: with the unlike fields side by side.
    """
    for model, other in zip(models, towers, strict=True):
        unlike = [field for field, value in tower.items() if other[field] != value]
        if unlike:
            listed = "; ".join(f"{field}: {tower[field]} | {other[field]}" for field in unlike)
            raise MismatchError(f"{model} is another architecture than the base {base.title} ({listed})")


def has_text_tower(base: Source) -> bool:
    """Whether a base is a full CLIP model, which a zero-shot head can be made from."""
    return config_of(base).get("model_type") == "clip"


def model_folder(source: Source) -> Path:
    """The folder of a checkpoint with its config and weights fetched."""
    for name in weight_names(source):
        source.fetch(name)
    return source.fetch("config.json").parent


def base_folder(source: Source) -> Path:
    """The folder of a base with its weights, tokenizer and image processor fetched."""
    for name in (TEXT_FILES | set(PROCESSOR_FILES)) & source.files:
        source.fetch(name)
    return model_folder(source)


def processor_folder(source: Source) -> Path:
    """The folder of a base with its image processor fetched, and no weights."""
    for name in {*PROCESSOR_FILES} & source.files:
        source.fetch(name)
    return source.fetch("config.json").parent


def content_sha(source: Source) -> str:
    """What pins a checkpoint's weights: its commit on the Hub, or the sha256 of a local folder's weight files."""
    if not source.ref.is_local:
        return str(source.ref.revision)
    digest = hashlib.sha256()
    for name in weight_names(source):
        with open(source.fetch(name), "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
