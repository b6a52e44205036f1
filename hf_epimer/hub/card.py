"""The metadata of a model card, as a stranger may have written it.

Only its own YAML block is read, of bounded size.
"""

from __future__ import annotations

import re
from typing import Any

from hf_epimer.outside import Unreadable, parse_yaml

LARGEST = 200_000
"""Characters of a card's metadata; a larger block is not read."""

_BLOCK = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)  # as the Hub finds it


def card_metadata(text: str) -> dict[str, Any]:
    """The metadata of a card, given as the text of its README.md; empty where there are none.

    Raises:
        Unreadable: they are no YAML, or too many.
    """
    block = _BLOCK.match(text)
    if block is None:
        return {}
    if len(block[1]) > LARGEST:
        raise Unreadable(f"{len(block[1])} characters are too many")
    metadata = parse_yaml(block[1])
    return metadata if isinstance(metadata, dict) else {}


def names_in(value: Any) -> list[str]:
    """The names that a field of a card lists: itself if it is a string, those of its entries that are; nothing else."""
    entries = value if isinstance(value, list) else [value]
    return [entry.strip() for entry in entries if isinstance(entry, str) and entry.strip()]
