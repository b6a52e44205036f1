"""The metadata of a model card, as a stranger may have written it.

Only its own YAML block is read, of bounded size and without aliases, which can make a small text enormous.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import yaml

logger = logging.getLogger(__name__)

LARGEST = 200_000
"""Characters of a card's metadata; a larger block is not read."""

_BLOCK = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)  # as the Hub finds it


def card_metadata(text: str, subject: str) -> dict[str, Any]:
    """The metadata of a card, empty where there are none or they cannot be read (with a warning).

    Args:
        text: of the README.md.
        subject: whose card it is, for the warning.
    """
    block = _BLOCK.match(text)
    if block is None:
        return {}
    try:
        if len(block[1]) > LARGEST:
            raise ValueError(f"{len(block[1])} characters are too many")
        metadata = yaml.load(block[1], Loader=_Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        logger.warning("%s: its README.md has no readable metadata (%s)", subject, reason)
        return {}
    return metadata if isinstance(metadata, dict) else {}


def names_in(value: Any) -> list[str]:
    """The names that a field of a card lists: itself if it is a string, those of its entries that are; nothing else."""
    entries = value if isinstance(value, list) else [value]
    return [entry.strip() for entry in entries if isinstance(entry, str) and entry.strip()]


class _Plain(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read in a card")
        return super().compose_node(parent, index)
