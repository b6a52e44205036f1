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
from hf_epimer.lora import adapters

logger = logging.getLogger(__name__)

TEXT_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"}
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
    """The common base: as given, else as the models say, else by the shape of a well-known model.

    An adapter says it in its config, with a revision; a checkpoint on its card.

    Args:
        towers: of the models that are no adapters.

    Raises:
        MismatchError: the models disagree.
        UsageError: there is nothing to go by.
    """
    if given is not None:
        return hub.resolve(given)
    said = [
        (model, _said_by_adapter(model, card) if is_adapter(model) else card)
        for model, card in zip(models, cards, strict=True)
    ]
    ref, why = base_from_cards(said)
    if ref is not None:
        return hub.resolve(ref)
    if "disagree" in why:
        raise MismatchError(f"{why}; name the right one with --base")
    known = CLIP_VISION.known_base(towers[0]) if towers else None
    if known is None:
        like = f" and {models[0]} is not shaped like a well-known CLIP model" if towers else ""
        raise UsageError(f"{why}{like}: name the base with --base")
    logger.info("base %s, by the shape of %s", known, models[0])
    return hub.resolve(ModelRef(known))


def _said_by_adapter(source: Source, card: dict[str, Any]) -> dict[str, Any]:
    config = adapter_config(source)
    if config.get("base_model_name_or_path"):
        base, revision = config["base_model_name_or_path"], config.get("revision")
        return {"base_model": base, "revision": revision, "said_in": adapters.ADAPTER_CONFIG}
    return card


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


def base_of(model: Source, given: ModelRef | None) -> Source:
    """The base of one checkpoint or adapter, found as by `find_base` and known to be of its architecture.

    Raises:
        MismatchError, UsageError: as in `find_base` and `check_towers`.
    """
    full = [] if is_adapter(model) else [model]
    towers = [tower_of(source) for source in full]
    base = find_base(given, [model], [model.card()], towers)
    check_towers(base, tower_of(base), full, towers)
    return base


def has_text_tower(base: Source) -> bool:
    """Whether a base is a full CLIP model, which a zero-shot head can be made from."""
    return config_of(base).get("model_type") == "clip"


def model_folder(source: Source) -> Path:
    """The folder of a checkpoint or adapter with its config and weights fetched."""
    paths = [source.fetch(name) for name in weight_names(source)]
    return paths[0].parent if is_adapter(source) else source.fetch("config.json").parent


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
