"""References to models, as words: `[label=]folder` or `[label=]org/name[@revision][:subfolder]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hf_epimer.errors import NotFoundError, UsageError
from hf_epimer.outside import exists, expanded

_LABEL = re.compile(r"\w[\w.-]*")

LONGEST_LABEL = 64
"""Characters of a label."""

_URL = re.compile(r"(?:[a-z][a-z\d+.-]*://|(?:www\.)?huggingface\.co/|hf\.co/)", re.IGNORECASE)

_REPO = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")

_SUBFOLDER = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*")


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form org/name."""
    return _REPO.fullmatch(text) is not None


def check_new_repo_id(text: str, flag: str = "") -> None:
    """Refuse what no repo can be called, before there is anything to push to it.

    Args:
        flag: that gave it, for messages.

    Raises:
        UsageError: it is not of the form org/name, or the Hub allows no such name.
    """
    given = f"{flag} {text!r}".strip()
    if not is_repo_id(text):
        raise UsageError(f"{given} is not of the form org/name")
    if not text.isascii():
        raise UsageError(f"{given} cannot be a repo's name: only ASCII letters, digits, - _ and . are allowed")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise UsageError(f"{given} cannot be a repo's name: {error}") from error


def same_repo(one: str, other: str) -> bool:
    """Whether two ids mean the same repo. The Hub's names ignore case, and one without an owner is the short name from
    the time when some had none: `mnist` is `ylecun/mnist`."""
    one, other = one.lower(), other.lower()
    return one == other or other.rpartition("/")[2] == one or one.rpartition("/")[2] == other


def _check_label(label: str, text: str) -> None:
    if len(label) > LONGEST_LABEL:
        raise UsageError(f"{text[:20]}...: a label has at most {LONGEST_LABEL} characters, this one {len(label)}")
    if not _LABEL.fullmatch(label):
        raise UsageError(f"{text!r}: a label is a task's name, letters, digits, - and _")


def _without_query(url: str) -> str:
    """An address as it may be shown: a query or a user's part may hold secrets."""
    return re.sub(r"//[^/@]*@", "//", re.split(r"[?#]", url, maxsplit=1)[0])


@dataclass(frozen=True)
class ModelRef:
    """`[label=]ref`, ref = a local folder (or file) or `org/name[@revision][:subfolder]`."""

    location: str
    revision: str | None = None
    label: str | None = None
    subfolder: str | None = None

    @classmethod
    def parse(cls, text: str, *, local: bool = True) -> ModelRef:
        """Read a reference from the command line or a recipe.

        Args:
            text: `[label=]ref`.
            local: whether it may name a folder; without, the disk is not looked at (for references from strangers).

        Raises:
            NotFoundError: it looks like a path and nothing is there.
            UsageError: it is neither a path nor `org/name[@revision][:subfolder]`.
        """
        label, rest = None, text
        if "=" in text and not _URL.match(text) and not (local and exists(Path(text))):
            label, rest = text.split("=", 1)
            _check_label(label, text)
        if local and rest and exists(expanded(rest)):
            return cls(str(expanded(rest).absolute()), None, label)
        if _URL.match(rest):
            raise UsageError(
                f"{_without_query(rest)} is a URL: name a repo as org/name or org/name@revision, a folder by its path"
            )
        place, colon, subfolder = rest.partition(":")
        repo, _, revision = place.partition("@")
        if local and (rest.startswith((".", "/", "~")) or repo.count("/") > 1):
            raise NotFoundError(f"{text}: folder {rest} does not exist")
        is_whole = bool(revision) or "@" not in rest
        if not _REPO.fullmatch(repo) or not is_whole or (colon and not _SUBFOLDER.fullmatch(subfolder)):
            what = "neither a folder nor" if local else "not"
            raise UsageError(f"{text!r} is {what} a Hub id of the form org/name or org/name@revision:subfolder")
        return cls(repo, revision or None, label, subfolder or None)

    @property
    def is_local(self) -> bool:
        """Whether it names a folder or file on this machine."""
        return Path(self.location).is_absolute()

    @property
    def name(self) -> str:
        """The last part: the folder's or repo's own name."""
        return Path(self.location).name

    def __str__(self) -> str:
        label = f"{self.label}=" if self.label else ""
        revision = f"@{self.revision}" if self.revision else ""
        subfolder = f":{self.subfolder}" if self.subfolder else ""
        return f"{label}{self.location}{revision}{subfolder}"
