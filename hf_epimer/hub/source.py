"""The files behind a resolved reference, fetched and checked.

Files go through huggingface_hub's cache; the client compares sizes only, so contents are checked here against what the
Hub lists.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub  # its names are loaded when they are used, which a merge of local folders never does
from huggingface_hub import constants
from huggingface_hub.errors import SafetensorsParsingError

from hf_epimer.errors import CheckpointError, HubError
from hf_epimer.hub.card import card_metadata
from hf_epimer.hub.conversion import Conversion
from hf_epimer.hub.refs import ModelRef
from hf_epimer.hub.retry import persist
from hf_epimer.hub.words import one_line
from hf_epimer.outside import Unreadable, read_text

logger = logging.getLogger(__name__)

CARD = "README.md"


@dataclass(frozen=True)
class Source:
    """A resolved reference: a local folder, or a Hub repo at one commit with the list of its files.

    Attributes:
        ref: the reference, its revision a commit; a repo by the name that the Hub itself has for it.
        label: unique among the models of a merge.
        files: names; of a folder those at its top level; of a repo's subfolder those in it, and the repo's card.
        sizes, sha256, blob_ids: by name, as far as they are known; a file has a sha256 or git's blob id.
        conversion: where the weights were converted, and `ref` is the commit of that pull request.
        unconverted: why there is no conversion although there are pickled weights only.
        is_listed: whether all its files are known; offline, only those in the cache may be.
        intact: files whose content has been checked in this process, so that no file is hashed twice.
    """

    ref: ModelRef
    label: str
    files: frozenset[str]
    sizes: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    sha256: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    blob_ids: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    intact: dict[str, Path] = field(default_factory=dict, compare=False, repr=False)
    conversion: Conversion | None = None
    unconverted: str = ""
    is_listed: bool = True

    @property
    def pinned(self) -> ModelRef:
        """The reference with its label and commit."""
        return replace(self.ref, label=self.label)

    @property
    def identity(self) -> str:
        """What makes two references the same checkpoint."""
        if self.ref.is_local:
            return str(Path(self.ref.location).resolve())
        return f"{self.ref.location.lower()}@{self.ref.revision}:{self.ref.subfolder or ''}"

    @property
    def title(self) -> str:
        """For cards and tables: the Hub id, or the folder's name."""
        return self.ref.name if self.ref.is_local else self.ref.location

    @property
    def is_here(self) -> bool:
        """Whether nothing of it can come from elsewhere: it is a folder, or HF_HUB_OFFLINE is set."""
        return self.ref.is_local or constants.HF_HUB_OFFLINE

    def has(self, name: str) -> bool:
        """Whether there is such a file, at the top level or below."""
        return name in self.files or (self.ref.is_local and Path(self.ref.location, name).is_file())

    def fetch(self, name: str) -> Path:
        """The local path of one of its files, downloaded and checked if need be."""
        if self.ref.is_local:
            location = Path(self.ref.location)
            return location if location.is_file() else location / name
        if name in self.intact:
            return self.intact[name]
        path = self._download(name)
        if self._is_intact(name, path):
            return self.intact.setdefault(name, path)
        damaged = f"{self}: the cached copy {path} is damaged (it is not what the Hub has)"
        if constants.HF_HUB_OFFLINE:
            raise HubError(f"{damaged}, and HF_HUB_OFFLINE is set")
        logger.warning("%s; fetching it again", damaged)
        path = self._download(name, force=True)
        if not self._is_intact(name, path):
            other = "another sha256" if name in self.sha256 else "another content"
            raise CheckpointError(f"{self}: {name} arrives with {other} than the Hub lists; try again later")
        return self.intact.setdefault(name, path)

    def header(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of every tensor in one of its safetensors files on the Hub; the rest of it stays there.

        Raises:
            CheckpointError: it is no safetensors file.
            HubError: it cannot be had.
        """

        def ask() -> Any:
            return huggingface_hub.HfApi().parse_safetensors_file_metadata(
                self.ref.location, self._path(name), revision=self._commit(name)
            )

        try:
            parsed = persist(ask, str(self), f"the header of {name}")
        except SafetensorsParsingError as error:
            raise CheckpointError(f"{self}: {name} is not a readable safetensors file ({one_line(error)})") from error
        return {tensor: (info.dtype, tuple(info.shape)) for tensor, info in parsed.tensors.items()}

    def _path(self, name: str) -> str:
        """Where one of its files lies in the repo, whose card is one for all of its subfolders."""
        return name if name == CARD or not self.ref.subfolder else f"{self.ref.subfolder}/{name}"

    def _commit(self, name: str) -> str | None:
        """Where one of its files lies: those that a conversion has no copy of stay where they were."""
        is_kept = self.conversion is not None and self._path(name) in self.conversion.kept
        return self.conversion.asked if self.conversion and is_kept else self.ref.revision

    def _download(self, name: str, force: bool = False) -> Path:
        commit = self._commit(name)

        def download() -> Path:
            options: dict[str, Any] = {"force_download": force, "local_files_only": constants.HF_HUB_OFFLINE}
            path = huggingface_hub.hf_hub_download(self.ref.location, self._path(name), revision=commit, **options)
            return Path(path)

        try:
            return persist(download, str(self), name)
        except OSError as error:
            raise HubError(
                f"{self}: {name} cannot be written to the cache {constants.HF_HUB_CACHE} ({one_line(error)}); set "
                "HF_HOME to a folder with room that you may write to"
            ) from error

    def _is_intact(self, name: str, path: Path) -> bool:
        sha256, blob_id = self.sha256.get(name), self.blob_ids.get(name)
        if sha256 is not None:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == sha256
        if blob_id is not None:
            content = path.read_bytes()
            return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == blob_id
        return True

    @property
    def elsewhere(self) -> str:
        """Where its safetensors may be found if it has none, for a message."""
        if self.ref.is_local:
            return ""
        return f"{self.unconverted}; safetensors in a pull request are named {self.ref.location}@refs/pr/NUMBER"

    @property
    def contents(self) -> dict[str, str]:
        """What each file's content is known by, its sha256 or git's blob id."""
        return self.sha256 | self.blob_ids

    def read_text(self, name: str) -> str:
        """A small text file."""
        return self.fetch(name).read_text(encoding="utf-8")

    @cached_property
    def card(self) -> dict[str, Any]:
        """The metadata of its model card, empty without one (or with one that cannot be read)."""
        if CARD not in self.files:
            if not self.is_listed:
                logger.warning("%s: %s is not in the cache, and HF_HUB_OFFLINE is set", self, CARD)
            return {}
        try:
            return card_metadata(read_text(self.fetch(CARD)))
        except PermissionError as error:
            raise CheckpointError(f"{self}: its {CARD} may not be read (permission denied)") from error
        except Unreadable as error:
            logger.warning("%s: its %s has no readable metadata (%s)", self, CARD, str(error)[:200])
            return {}

    def __str__(self) -> str:
        return str(self.pinned)


def fetch_all(wanted: Sequence[tuple[Source, str]], on_file: Callable[[int], None] = lambda size: None) -> None:
    """Bring several files into the cache, two at a time, and check them.

    Args:
        wanted: (source, file name).
        on_file: called with the size of every file that is there.
    """

    def one(item: tuple[Source, str]) -> None:
        source, name = item
        source.fetch(name)
        on_file(source.sizes.get(name, 0))

    pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="fetch")
    try:
        for future in [pool.submit(one, item) for item in wanted]:
            future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interruption does not wait for what is under way
