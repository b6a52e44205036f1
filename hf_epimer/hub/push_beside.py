"""Adding files to a repo that is there already, with what its card says of them, in one commit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from hf_epimer.errors import EpimerError, PushError
from hf_epimer.hub.refs import ModelRef
from hf_epimer.hub.resolve import source_at
from hf_epimer.hub.retry import persist
from hf_epimer.hub.source import CARD
from hf_epimer.hub.words import one_line


def push_beside(
    repo_id: str,
    branch: str | None,
    files: dict[str, Path],
    *,
    expected: dict[str, str | None],
    sections: Sequence[str],
    title: str,
) -> str:
    """Add files and sections of the model card to a repo that is there already, in one commit.

    Args:
        branch: None for main.
        files: name in the repo -> file.
        expected: weight file -> the sha256 it must still have, as far as it is known.
        sections: Markdown that begins with a heading of the second level each; one replaces the section of that name.
        title: of the commit.

    Returns:
        The address of the commit.

    Raises:
        PushError: the weights have changed meanwhile, or the push failed; the files are kept.
    """
    api = huggingface_hub.HfApi()
    kept = "; what was measured is kept in the cache, run the same command again"

    def commit() -> str:
        present = source_at(ModelRef(repo_id), api.model_info(repo_id, revision=branch, files_metadata=True))
        moved = [name for name, sha256 in expected.items() if sha256 and present.sha256.get(name) != sha256]
        if moved:
            raise PushError(f"{repo_id}: {moved[0]} was changed while it was measured{kept}")
        card = present.read_text(CARD) if CARD in present.files else ""
        for section in sections:
            card = with_section(card, section)
        contents: dict[str, Path | bytes] = {**files, CARD: card.encode()}
        added = [
            huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
            for name, content in contents.items()
        ]
        result = api.create_commit(
            repo_id, added, commit_message=title, revision=branch, parent_commit=present.ref.revision
        )
        return str(result.commit_url)

    try:
        return persist(commit, repo_id, "the commit")
    except PushError:
        raise
    except EpimerError as error:
        raise PushError(f"{error}{kept}") from error
    except OSError as error:
        raise PushError(f"{repo_id}: {one_line(error)}{kept}") from error


def with_section(card: str, section: str) -> str:
    """A model card with a section added, or replaced where one has the same heading."""
    heading = section.splitlines()[0]
    lines = card.rstrip().splitlines()
    if heading in lines:
        start = lines.index(heading)
        end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith(("# ", "## "))), len(lines))
        return "\n".join([*lines[:start], section.rstrip(), "", *lines[end:]]).rstrip() + "\n"
    return "\n".join([*lines, "", section.rstrip()]).lstrip("\n") + "\n"
