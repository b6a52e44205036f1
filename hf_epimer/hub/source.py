"""Resolving references and fetching the files behind them.

A reference is resolved to a commit once; everything read later comes from that commit. Files go through
huggingface_hub's cache; the client compares sizes only, so contents are checked here against what the Hub lists.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub  # its names are loaded when they are used, which a merge of local folders never does
from huggingface_hub import constants

from hf_epimer.errors import CheckpointError, HubError, NotFoundError
from hf_epimer.hub.card import card_metadata
from hf_epimer.hub.conversion import BOT, Conversion, find_conversion, is_convertible
from hf_epimer.hub.notes import cached_commit, read_note, write_note
from hf_epimer.hub.refs import ModelRef, is_repo_id
from hf_epimer.hub.retry import persist
from hf_epimer.hub.words import one_line
from hf_epimer.outside import Unreadable, read_text

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

logger = logging.getLogger(__name__)

CARD = "README.md"


@dataclass(frozen=True)
class Source:
    """A resolved reference: a local folder, or a Hub repo at one commit with the list of its files.

    Attributes:
        ref: the reference, its revision a commit; a repo by the name that the Hub itself has for it.
        label: unique among the models of a merge.
        files: names at the top level.
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
        damaged = f"{self}: the cached copy {path} is damaged (it is not what the Hub has)"
        if constants.HF_HUB_OFFLINE:
            raise HubError(f"{damaged}, and HF_HUB_OFFLINE is set")
        logger.warning("%s; fetching it again", damaged)
        path = self._download(name, force=True)
        if not self._is_intact(name, path):
            other = "another sha256" if name in self.sha256 else "another content"
            raise CheckpointError(f"{self}: {name} arrives with {other} than the Hub lists; try again later")
        return self.intact.setdefault(name, path)

    def _download(self, name: str, force: bool = False) -> Path:
        is_kept = self.conversion is not None and name in self.conversion.kept
        commit = self.conversion.asked if self.conversion and is_kept else self.ref.revision

        def download() -> Path:
            return Path(huggingface_hub.hf_hub_download(self.ref.location, name, revision=commit, force_download=force))

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


def resolve(ref: ModelRef) -> Source:
    """Look a reference up: which commit, which files. Nothing is downloaded.

    A repo with pickled weights only is replaced by its conversion where there is one.

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
    if constants.HF_HUB_OFFLINE:
        return _resolve_offline(ref, label)
    api = huggingface_hub.HfApi()
    source = persist(
        lambda: source_at(ref, api.model_info(ref.location, revision=ref.revision, files_metadata=True)),
        str(ref),
        "its list of files",
    )
    if is_convertible(source.files):
        source = _converted(ref, source)
    elif ref.revision == source.ref.revision:  # a commit, which may be that of a conversion found before
        note = read_note("model", source.ref.location, ref.revision) or {}
        source = _from_note(ref, label, note) if note.get("conversion") else source
    for name, revision in {(ref.location, ref.revision), (source.ref.location, source.ref.revision)}:
        write_note("model", name, revision, _to_note(source))
    return source


def dataset_commit(repo_id: str) -> str:
    """The commit that a data set's main branch is at; the last one seen when HF_HUB_OFFLINE is set.

    Raises:
        NotFoundError, AccessError, HubError: as in `resolve`.
    """
    where = f"data set {repo_id}"
    if constants.HF_HUB_OFFLINE:
        note = read_note("dataset", repo_id, None) or {}
        commit = note.get("commit") or cached_commit("dataset", repo_id, None)
        if commit is None:
            raise HubError(f"{where}: not in the local cache, and HF_HUB_OFFLINE is set")
        return str(commit)
    commit = persist(lambda: huggingface_hub.HfApi().dataset_info(repo_id), where, "its commit").sha
    write_note("dataset", repo_id, None, {"commit": commit})
    return str(commit)


def dataset_bytes(repo_id: str) -> int:
    """Bytes of all files of a data set; 0 when HF_HUB_OFFLINE is set, where nothing can be fetched anyway.

    Raises:
        NotFoundError, AccessError, HubError: as in `resolve`.
    """
    if constants.HF_HUB_OFFLINE:
        return 0
    info = persist(
        lambda: huggingface_hub.HfApi().dataset_info(repo_id, files_metadata=True),
        f"data set {repo_id}",
        "its list of files",
    )
    return sum(sibling.size or 0 for sibling in info.siblings or [])


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


def source_at(ref: ModelRef, info: ModelInfo) -> Source:
    """A reference as the Hub has just described it, with its files' metadata."""
    siblings = info.siblings or []
    return Source(
        ModelRef(info.id if is_repo_id(info.id) else ref.location, info.sha, ref.label),
        ref.label or ref.name,
        frozenset(sibling.rfilename for sibling in siblings),
        {sibling.rfilename: sibling.size or 0 for sibling in siblings},
        {sibling.rfilename: sibling.lfs.sha256 for sibling in siblings if sibling.lfs},
        {sibling.rfilename: sibling.blob_id for sibling in siblings if sibling.blob_id and not sibling.lfs},
    )


def _converted(ref: ModelRef, asked: Source) -> Source:
    """The same repo at the commit of the bot's pull request, or as it is with the reason why not."""
    commit = str(asked.ref.revision)
    try:
        found = find_conversion(ref.location, asked.contents)
    except HubError as error:  # adapters need no weights of their base and go on; everybody else is told
        return replace(asked, unconverted=f"; whether they have been converted could not be found out: {error}")
    if found is None:
        return replace(asked, unconverted=f"; {BOT} has no open pull request that converts them")
    number, info = found
    pulled = source_at(ref, info)
    kept = tuple(sorted(name for name in asked.files if name == CARD or name.endswith(".safetensors")))
    others = asked.contents.items()
    differing = sorted(name for name, content in others if name not in kept and pulled.contents.get(name) != content)
    conversion = Conversion(number, commit, kept)
    logger.warning(
        "%s: only pickled weights at this revision; read instead are the safetensors made of them in %s, commit %s%s",
        ref, conversion, pulled.ref.revision,
        f" (where {', '.join(differing[:3])} differ)" if differing else "",
    )  # fmt: skip

    def merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in ours.items() if k != CARD} | {k: v for k, v in theirs.items() if k in kept}

    return replace(
        pulled,
        conversion=conversion,
        files=(pulled.files - {CARD}) | set(kept),
        sizes=merged(pulled.sizes, asked.sizes),
        sha256=merged(pulled.sha256, asked.sha256),
        blob_ids=merged(pulled.blob_ids, asked.blob_ids),
    )


def _to_note(source: Source) -> dict[str, Any]:
    return {
        "repo_id": source.ref.location,
        "commit": source.ref.revision,
        "files": sorted(source.files),
        "sizes": source.sizes,
        "sha256": source.sha256,
        "blob_ids": source.blob_ids,
        "conversion": asdict(source.conversion) if source.conversion else None,
        "unconverted": source.unconverted,
    }


def _resolve_offline(ref: ModelRef, label: str) -> Source:
    """As it was when it was last resolved, or else what the cache has of the commit that it last saw."""
    note = read_note("model", ref.location, ref.revision)
    return _from_note(ref, label, note) if note else _resolve_from_cache(ref, label)


def _from_note(ref: ModelRef, label: str, note: dict[str, Any]) -> Source:
    return Source(
        ModelRef(note["repo_id"], note["commit"], ref.label),
        label,
        frozenset(note["files"]),
        note["sizes"],
        note["sha256"],
        note["blob_ids"],
        conversion=Conversion(**note["conversion"]) if note["conversion"] else None,
        unconverted=note["unconverted"],
    )


def _resolve_from_cache(ref: ModelRef, label: str) -> Source:
    """The files that another program left in the cache, and those that a checkpoint or adapter has in any case."""
    commit = cached_commit("model", ref.location, ref.revision)
    configs = ("config.json", "adapter_config.json")  # of a checkpoint, of an adapter
    found = [huggingface_hub.try_to_load_from_cache(ref.location, name, revision=commit) for name in configs if commit]
    config = next((path for path in found if isinstance(path, str)), None)
    if config is None:
        raise HubError(f"{ref}: not in the local cache, and HF_HUB_OFFLINE is set")
    paths = [path for path in Path(config).parent.iterdir() if path.is_file()]
    names = {path.name for path in paths}
    return Source(
        ModelRef(ref.location, commit, ref.label),
        label,
        frozenset(names | _expected_beside(names, Path(config).parent)),
        {path.name: path.stat().st_size for path in paths},
        is_listed=False,
    )


def _expected_beside(names: set[str], folder: Path) -> set[str]:
    if "adapter_config.json" in names:
        return {"adapter_model.safetensors"}
    if "model.safetensors.index.json" not in names:
        return {"model.safetensors"}
    try:
        return set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return set()  # whoever reads the index says what is wrong with it
