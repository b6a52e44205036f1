"""Finding the common base of several checkpoints: as given, else as they say, else by their shape."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_epimer.checkpoints.reader import read_json
from hf_epimer.errors import AccessError, MismatchError, NotFoundError, UsageError
from hf_epimer.hub.refs import ModelRef, is_repo_id, same_repo
from hf_epimer.hub.source import Source
from hf_epimer.lora.peft_files import ADAPTER_CONFIG
from hf_epimer.models import find_architecture
from hf_epimer.models.source import ModelSource, resolve_model

logger = logging.getLogger(__name__)

MERGE_RECIPE = "merge_config.json"


def find_base(given: ModelRef | None, models: Sequence[ModelSource]) -> ModelSource:
    """The common base: as given, else as the models say, else by the shape of a well-known model.

    An adapter says it in its config, with a revision; a checkpoint on its card.

    Raises:
        MismatchError: the models disagree.
        UsageError: there is nothing to go by.
    """
    if given is not None:
        return resolve_model(given)
    ref, why = base_from_cards([(model, _what_it_says(model)) for model in models])
    if ref is not None:
        try:
            return resolve_model(ref)
        except (NotFoundError, AccessError) as error:
            raise type(error)(
                f"{error}; it is what the checkpoints name as their base: name another with --base"
            ) from error
    if "disagree" in why:
        raise MismatchError(f"{why}; name the right one with --base")
    full = next((model for model in models if not model.is_adapter), None)
    if full is None:
        raise UsageError(f"{why}: name the base with --base")
    known = full.architecture.known_base(full.vision_config)
    if known is None:
        raise UsageError(
            f"{why} and {full} is not shaped like a well-known {full.architecture.name}: name the base with --base"
        )
    logger.info("base %s, by the shape of %s", known, full)
    for model in models:
        origin = None if model.is_adapter else model.config.get("_name_or_path")
        is_other = isinstance(origin, str) and is_repo_id(origin) and not same_repo(origin, model.ref.location)
        if is_other and not same_repo(str(origin), known):
            logger.warning(
                "%s: the base is taken to be %s, by its shape, but its config.json says that it comes from %s; if that "
                "is right, name it with --base", model, known, origin,
            )  # fmt: skip
    return resolve_model(ModelRef(known))


def _what_it_says(model: ModelSource) -> dict[str, Any]:
    """`base_model`, and a `revision` where one is known, from an adapter's config, a merge's recipe or the card."""
    base = model.config.get("base_model_name_or_path") if model.is_adapter else None
    if base:
        return {"base_model": base, "revision": model.config.get("revision"), "said_in": ADAPTER_CONFIG}
    if model.card.get("base_model_relation") == "merge":  # what its card calls base models was merged
        return _base_of_merge(model)
    return model.card


def _base_of_merge(model: ModelSource) -> dict[str, Any]:
    """What a merge says of its base in its own recipe; nothing where that is no Hub id and no folder that is there."""
    if MERGE_RECIPE not in model.files:
        return {}
    try:
        base = ModelRef.parse(
            str(read_json(model.fetch(MERGE_RECIPE), str(model)).get("base")), local=model.ref.is_local
        )
    except (UsageError, NotFoundError):
        return {}
    where = {"revision": base.revision, "subfolder": base.subfolder}
    return {"base_model": base.location, **where, "said_in": MERGE_RECIPE}


def check_same_architecture(base: ModelSource, models: Sequence[ModelSource]) -> None:
    """Refuse checkpoints of another family or shape than the base; what an adapter fits is seen in its weights.

    Raises:
        MismatchError: with the unlike fields side by side.
    """
    family, config = base.architecture, base.vision_config
    for model in models:
        if model.is_adapter:
            continue
        if model.architecture is not family:
            raise MismatchError(f"{model} is a {model.architecture.name}, the base {base.title} a {family.name}")
        other = model.vision_config
        unlike = [field for field, value in config.items() if other[field] != value]
        if unlike:
            listed = "; ".join(f"{field}: {config[field]} | {other[field]}" for field in unlike)
            raise MismatchError(f"{model} is another architecture than the base {base.title} ({listed})")


def base_of(model: ModelSource, given: ModelRef | None) -> ModelSource:
    """The base of one checkpoint or adapter, found as by `find_base` and known to be of its architecture.

    Raises:
        MismatchError, UsageError: as in `find_base` and `check_same_architecture`.
        CheckpointError: it is of no family that is known here.
    """
    base = find_base(given, [model])
    find_architecture(base.config, str(base))
    check_same_architecture(base, [model])
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
    bases = {ref.location if ref.is_local else ref.location.lower() for ref in named.values()}
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
    same_place = source.ref.subfolder if "said_in" not in card else card.get("subfolder")
    return ModelRef(name, card.get("revision"), subfolder=same_place)
