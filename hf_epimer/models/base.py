"""Finding the common base of several checkpoints: as given, else as they say, else by their shape."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_epimer.errors import MismatchError, UsageError
from hf_epimer.hub import source as hub
from hf_epimer.hub.refs import ModelRef, is_repo_id
from hf_epimer.hub.source import Source
from hf_epimer.lora import adapter as adapters
from hf_epimer.models.clip import CLIP_VISION
from hf_epimer.models.files import adapter_config, is_adapter, tower_of

logger = logging.getLogger(__name__)


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


def base_from_cards(cards: Sequence[tuple[Source, dict[str, Any]]]) -> tuple[ModelRef | None, str]:
    """The base model on which all cards that name one agree, or None and why not.

    A card with several base models is a merge's: it names none. The card of a local folder may name a folder, absolute
    or relative to itself (or, as PEFT writes it, to the working directory, if it cannot be a Hub id); one from the Hub
    names Hub ids and nothing else.

    Args:
        cards: every checkpoint with its card's metadata; for an adapter `base_model` and `revision`
            as its config has them, which is then `said_in`.

    Raises:
        MismatchError: a card names something that is neither.
    """
    named: dict[str, ModelRef] = {}
    for source, card in cards:
        base = card.get("base_model")
        choices = base if isinstance(base, list) else [base]
        if len(choices) == 1 and choices[0]:
            named[source.label] = _named_base(source, str(choices[0]), card)
    bases = {ref.location for ref in named.values()}
    revisions = {ref.revision for ref in named.values()} - {None}
    if len(bases) == 1 and len(revisions) <= 1:  # one that names no revision agrees with one that does
        return max(named.values(), key=lambda ref: ref.revision or ""), ""
    if not bases:
        return None, "no model card names a base_model"
    listed = ", ".join(f"{label} says {base}" for label, base in named.items())
    return None, f"the models disagree on base_model: {listed}"


def _named_base(source: Source, name: str, card: dict[str, Any]) -> ModelRef:
    if source.ref.is_local:
        places = [Path(source.ref.location), *([] if is_repo_id(name) else [Path()])]
        if folder := next((place / name for place in places if (place / name).is_dir()), None):
            return ModelRef(str(folder.resolve()))
    if not is_repo_id(name):
        where = card.get("said_in", "its card")
        raise MismatchError(f"{source}: {where} names base_model {name!r}, which cannot be found; name it with --base")
    return ModelRef(name, card.get("revision"))
