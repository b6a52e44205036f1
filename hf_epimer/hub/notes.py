"""What the Hub last said about a revision, noted beside the files in huggingface_hub's cache for working offline.

One small JSON file per repo and revision: the commit, and the files it has. It goes with the repo's folder when that is
removed from the cache. A note that cannot be written or read is done without.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of the notes: those of another are as good as none."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


def write_note(repo_type: str, repo_id: str, revision: str | None, content: dict[str, Any]) -> None:
    """Keep `content`, as JSON, as what was said about a revision (None for main)."""
    path = _note(repo_type, repo_id, revision)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump({"format": FORMAT} | content, file)
        os.replace(file.name, path)
    except OSError as error:
        logger.info("%s: no note for working offline later (%s)", repo_id, error)


def read_note(repo_type: str, repo_id: str, revision: str | None) -> dict[str, Any] | None:
    """What was last said about a revision; None where there is no note that can be read."""
    try:
        content = json.loads(_note(repo_type, repo_id, revision).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def cached_commit(repo_type: str, repo_id: str, revision: str | None) -> str | None:
    """The commit that the cache itself has for a revision, if any program has noted one there."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    try:
        return (_folder(repo_type, repo_id) / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _note(repo_type: str, repo_id: str, revision: str | None) -> Path:
    return _folder(repo_type, repo_id) / ".hf-epimer" / f"{quote(revision or 'main', safe='')}.json"


def _folder(repo_type: str, repo_id: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type)
