"""The Hugging Face Hub: resolving references and fetching files. With `pushing`, the only module that talks to it.

A reference is resolved to a commit once; everything read later comes from that commit. Files go through
huggingface_hub's cache; the client compares sizes only, so contents are checked here against the sha256 the Hub lists.
Requests that fail for reasons that pass (5xx, 429, a broken connection) are repeated.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import (
    HfApi,
    ModelCard,
    constants,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from hf_epimer.errors import AccessError, CheckpointError, HubError, NotFoundError
from hf_epimer.hub.refs import ModelRef

logger = logging.getLogger(__name__)

BACKOFF = (1.0, 2.0, 4.0, 8.0)
"""Seconds between tries of a request that may work the next time."""

# the HTTP library of huggingface_hub was renamed between releases; its base error is in every release's own error
_HTTP_ERRORS: tuple[type[Exception], ...] = tuple(
    base for base in HfHubHTTPError.__mro__ if base.__module__.startswith("httpx")
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Source:
    """A resolved reference: a local folder, or a Hub repo at one commit with the list of its files.

    Attributes:
        ref: the reference, its revision a commit.
        label: unique among the models of a merge.
        files: names at the top level.
        sizes, sha256: by name, as far as they are known.
        intact: files whose content has been checked in this process, so that no file is hashed twice.
    """

    ref: ModelRef
    label: str
    files: frozenset[str]
    sizes: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    sha256: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    intact: dict[str, Path] = field(default_factory=dict, compare=False, repr=False)

    @property
    def pinned(self) -> ModelRef:
        """The reference with its label and commit."""
        return ModelRef(self.ref.location, self.ref.revision, self.label)

    @property
    def identity(self) -> str:
        """What makes two references the same checkpoint."""
        if self.ref.is_local:
            return str(Path(self.ref.location).resolve())
        return f"{self.ref.location.lower()}@{self.ref.revision}"

    @property
    def title(self) -> str:
        """For cards and tables: the Hub id, or the folder's name."""
        return self.ref.name if self.ref.is_local else self.ref.location

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
        logger.warning("%s: the cached copy %s is damaged (its sha256 is not the Hub's); fetching it again", self, path)
        path = self._download(name, force=True)
        if not self._is_intact(name, path):
            raise CheckpointError(f"{self}: {name} arrives with another sha256 than the Hub lists; try again later")
        return self.intact.setdefault(name, path)

    def _download(self, name: str, force: bool = False) -> Path:
        def download() -> Path:
            return Path(hf_hub_download(self.ref.location, name, revision=self.ref.revision, force_download=force))

        return persist(download, f"{self}: {name}")

    def _is_intact(self, name: str, path: Path) -> bool:
        expected = self.sha256.get(name)
        if expected is None:
            return True
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == expected

    def read_text(self, name: str) -> str:
        """A small text file."""
        return self.fetch(name).read_text(encoding="utf-8")

    def card(self) -> dict[str, Any]:
        """The metadata of its model card, empty without one (or with one that cannot be read)."""
        if "README.md" not in self.files:
            return {}
        try:
            return dict(ModelCard(self.read_text("README.md"), ignore_metadata_errors=True).data.to_dict())
        except (ValueError, yaml.YAMLError) as error:
            logger.warning("%s: its README.md has no readable metadata (%s)", self, one_line(error))
            return {}

    def __str__(self) -> str:
        return str(self.pinned)


def resolve(ref: ModelRef) -> Source:
    """Look a reference up: which commit, which files. Nothing is downloaded.

    Raises:
        NotFoundError: no such folder, repo or revision, or private without a token that may read it.
        AccessError: gated, or the token is not valid.
        HubError: the Hub cannot be reached.
    """
    label = ref.label or ref.name
    if ref.is_local:
        folder = Path(ref.location)
        if not folder.is_dir():
            raise NotFoundError(f"{ref}: {folder} is not a folder")
        paths = [path for path in folder.iterdir() if path.is_file()]
        return Source(ref, label, frozenset(p.name for p in paths), {p.name: p.stat().st_size for p in paths})
    if constants.is_offline_mode():
        return _resolve_offline(ref, label)
    api = HfApi()
    info = persist(lambda: api.model_info(ref.location, revision=ref.revision, files_metadata=True), str(ref))
    with contextlib.suppress(RevisionResolutionError):
        # notes in the cache which commit the revision was, so that the same command works offline later; the commit
        # itself is not taken from here, because this call falls back to an old note when the Hub is in trouble
        api.resolve_revision(ref.location, revision=ref.revision)
    siblings = info.siblings or []
    return Source(
        ModelRef(ref.location, info.sha, ref.label),
        label,
        frozenset(sibling.rfilename for sibling in siblings),
        {sibling.rfilename: sibling.size or 0 for sibling in siblings},
        {sibling.rfilename: sibling.lfs.sha256 for sibling in siblings if sibling.lfs},
    )


def _resolve_offline(ref: ModelRef, label: str) -> Source:
    """From the local cache alone: the commit it last saw for this revision, and the files it has of it."""
    with translated(str(ref)):
        commit = HfApi().resolve_revision(ref.location, revision=ref.revision, local_files_only=True).resolved
    configs = ("config.json", "adapter_config.json")  # of a checkpoint, of an adapter
    found = [try_to_load_from_cache(ref.location, name, revision=commit) for name in configs]
    config = next((path for path in found if isinstance(path, str)), None)
    if config is None:
        raise HubError(f"{ref}: not in the local cache, and HF_HUB_OFFLINE is set")
    folder = Path(config).parent
    paths = [path for path in folder.iterdir() if path.is_file()]
    pinned = ModelRef(ref.location, commit, ref.label)
    return Source(pinned, label, frozenset(p.name for p in paths), {p.name: p.stat().st_size for p in paths})


def dataset_commit(repo_id: str) -> str:
    """The commit that a data set's main branch is at; the last one seen when HF_HUB_OFFLINE is set.

    Raises:
        NotFoundError, AccessError, HubError: as in `resolve`.
    """
    api = HfApi()
    where = f"data set {repo_id}"
    if constants.is_offline_mode():
        with translated(where):
            return str(api.resolve_revision(repo_id, repo_type="dataset", local_files_only=True).resolved)
    commit = persist(lambda: api.dataset_info(repo_id), where).sha
    with contextlib.suppress(RevisionResolutionError):
        api.resolve_revision(repo_id, repo_type="dataset")  # a note in the cache, for working offline later
    return str(commit)


def dataset_bytes(repo_id: str) -> int:
    """Bytes of all files of a data set; 0 when HF_HUB_OFFLINE is set, where nothing can be fetched anyway.

    Raises:
        NotFoundError, AccessError, HubError: as in `resolve`.
    """
    if constants.is_offline_mode():
        return 0
    info = persist(lambda: HfApi().dataset_info(repo_id, files_metadata=True), f"data set {repo_id}")
    return sum(sibling.size or 0 for sibling in info.siblings or [])


def fetch_all(wanted: list[tuple[Source, str]], on_file: Callable[[int], None] = lambda size: None) -> None:
    """Bring several files into the cache, two at a time, and check them.

    Args:
        wanted: (source, file name).
        on_file: called with the size of every file that is there.
    """

    def one(item: tuple[Source, str]) -> None:
        source, name = item
        source.fetch(name)
        on_file(source.sizes.get(name, 0))

    pool = ThreadPoolExecutor(max_workers=2)
    try:
        for future in [pool.submit(one, item) for item in wanted]:
            future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interruption does not wait for what is under way


def persist(request: Callable[[], Result], what: str) -> Result:
    """Make a request, again where the failure may pass, and say plainly what went wrong in the end."""
    for wait in (*BACKOFF, None):
        try:
            with translated(what):
                return request()
        except HubError as error:
            pause = _retry_after(error.__cause__, wait)
            if pause is None:
                raise
            log = logger.warning if pause > 10 else logger.info
            log("%s; trying again in %.0f s", error, pause)
            time.sleep(pause)
    raise AssertionError("the last try either returns or raises")


def _retry_after(cause: BaseException | None, wait: float | None) -> float | None:
    """Seconds to wait before the next try, None when there is no point in one."""
    if wait is None or not isinstance(cause, _HTTP_ERRORS) or isinstance(cause, OfflineModeIsEnabled):
        return None
    response = getattr(cause, "response", None)
    if response is None:
        return wait  # the connection broke, or the answer was lost
    if response.status_code != 429 and response.status_code < 500:
        return None
    asked = response.headers.get("Retry-After", "")
    return max(wait, float(asked)) if asked.isdigit() else wait


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn the client's errors into ours: what was asked for, what went wrong, what to do."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise
    except RevisionResolutionError as error:
        raise HubError(f"{what}: not in the local cache, and HF_HUB_OFFLINE is set") from error
    except GatedRepoError as error:
        raise AccessError(
            f"{what} is gated: accept its terms on its page and set HF_TOKEN to a token that may read it"
        ) from error
    except RepositoryNotFoundError as error:
        raise NotFoundError(
            f"{what}: there is no such repo, or it is private and the token in use (HF_TOKEN) may not see it"
        ) from error
    except RevisionNotFoundError as error:
        raise NotFoundError(f"{what}: the repo has no such revision") from error
    except LocalEntryNotFoundError as error:
        raise HubError(f"{what}: not in the local cache, and the Hub cannot be reached ({one_line(error)})") from error
    except EntryNotFoundError as error:
        raise NotFoundError(f"{what}: the repo has no such file") from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{what}: HF_HUB_OFFLINE is set") from error
    except HfHubHTTPError as error:
        raise _http_error(what, error) from error
    except _HTTP_ERRORS as error:
        raise HubError(f"{what}: the Hub at {constants.ENDPOINT} cannot be reached ({one_line(error)})") from error


def _http_error(what: str, error: HfHubHTTPError) -> HubError:
    status = error.response.status_code if error.response is not None else 0
    if status == 401:
        return AccessError(f"{what}: the Hub does not accept the token in use (HF_TOKEN, or `hf auth login` again)")
    if status == 403:
        return AccessError(f"{what}: the token in use has no permission for this ({one_line(error)})")
    if status == 429:
        return HubError(f"{what}: the Hub asks for fewer requests (429), even after waiting; try again later")
    return HubError(f"{what}: the Hub answered {status} ({one_line(error)})")


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
