"""The license of a merge, by the cards of what it is made of: theirs, where they agree; else nobody can say it here."""

from __future__ import annotations

import logging
import re
from typing import Any

from hf_epimer.hub.card import names_in
from hf_epimer.hub.source import CARD
from hf_epimer.pipeline.plan import Plan

logger = logging.getLogger(__name__)

_LICENSE = re.compile(r"[\w.+-]{1,60}")
"""What the Hub's names of licenses look like; a card may have anything in its place."""


def licenses(plan: Plan) -> dict[str, list[str]]:
    """License -> what is under it: the base, or models by their labels. A card that names none is in no list."""
    found: dict[str, list[str]] = {}
    for label, card in _cards(plan):
        for name in names_in(card.get("license")):
            if _LICENSE.fullmatch(name):
                found.setdefault(name.lower(), []).append(label)
    return found


def license_metadata(plan: Plan) -> dict[str, Any]:
    """What the card of the merge says of its license: nothing, unless all inputs that name one name the same."""
    found = licenses(plan)
    if len(found) != 1:
        return {}
    (license,) = found
    named = [card for _, card in _cards(plan) if names_in(card.get("license"))]
    more = {key: {str(card.get(key)) for card in named} for key in ("license_name", "license_link")}
    agreed = {key: values.pop() for key, values in more.items() if len(values) == 1}
    return {"license": license} | {key: value for key, value in agreed.items() if value != "None"}


def warn_of_unlike_licenses(plan: Plan) -> None:
    """One line where the inputs are under different licenses."""
    found = licenses(plan)
    if len(found) > 1:
        listed = "; ".join(f"{license}: {', '.join(labels)}" for license, labels in found.items())
        logger.warning(
            "different licenses (%s): look whether these may be combined; the card of the merge names none", listed
        )


def _cards(plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    sources = [("the base", plan.base), *((model.label, model.source) for model in plan.models)]
    return [(label, source.card) for label, source in sources if CARD in source.files]
