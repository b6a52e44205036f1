"""Repos that have pickled weights only, and the pull request in which the Hub's bot has converted them.

openai/clip-vit-base-patch32 is one: its safetensors lie in an open pull request of SFconvertbot. Author and title are
those that transformers looks for (`transformers.safetensors_conversion`). Such a pull request counts where it holds the
same pickled weights as the revision asked for, whatever else was committed there since.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import huggingface_hub

from hf_epimer.hub.retry import persist

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

BOT = "SFconvertbot"
TITLE = "Adding `safetensors` variant of this model"

_CONVERTED = frozenset({"model.safetensors", "model.safetensors.index.json"})
_ADAPTER = "adapter_config.json"
_PICKLED = re.compile(r"pytorch_model.*\.bin")


@dataclass(frozen=True)
class Conversion:
    """Where the weights of a reference come from instead.

    Attributes:
        pull_request: its number.
        asked: the commit that was asked for, which has pickled weights only.
        kept: names of the files that are read at that commit nevertheless: the card, and statistics.
    """

    pull_request: int
    asked: str
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{BOT}'s pull request {self.pull_request}, refs/pr/{self.pull_request}"


def pickled_weights(files: Iterable[str]) -> list[str]:
    """The pickled weights of the kind that the bot converts."""
    return sorted(filter(_PICKLED.fullmatch, files))


def is_convertible(files: Iterable[str]) -> bool:
    """Whether a repo with these files has pickled weights of the kind that the bot converts, and no others."""
    names = set(files)
    return not names & {*_CONVERTED, _ADAPTER} and bool(pickled_weights(names))


def find_conversion(repo_id: str, asked: Mapping[str, str]) -> tuple[int, ModelInfo] | None:
    """The bot's open pull request on a repo that holds the same pickled weights.

    Args:
        asked: name -> sha256 (or git's blob id) of the files of the revision asked for.

    Returns:
        Its number and its files at the commit it is at; None where there is no such pull request.

    Raises:
        HubError: one of its kinds.
    """
    api = huggingface_hub.HfApi()
    pickled = {name: asked[name] for name in pickled_weights(asked)}
    pulls = persist(
        lambda: list(
            api.get_repo_discussions(
                repo_id, author=BOT, discussion_type="pull_request", discussion_status="open"
            )
        ),
        repo_id,
        "its open pull requests",
    )  # fmt: skip
    for number in [p.num for p in pulls if (p.author, p.title, p.status) == (BOT, TITLE, "open")]:
        revision = f"refs/pr/{number}"
        info = persist(
            lambda revision=revision: api.model_info(repo_id, revision=revision, files_metadata=True),  # type: ignore[misc]
            f"{repo_id}@{revision}",
            "its list of files",
        )
        offered = {entry.rfilename: content_id(entry) for entry in info.siblings or []}
        if _CONVERTED & offered.keys() and all(
            content and offered.get(name) == content for name, content in pickled.items()
        ):
            return number, info
    return None


def content_id(entry: RepoSibling) -> str:
    """What a file's content is known by: its sha256 where it is in LFS, else git's id of it."""
    return (entry.lfs.sha256 if entry.lfs else entry.blob_id) or ""
