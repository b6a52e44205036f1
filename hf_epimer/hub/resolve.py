"""From a reference to a commit and its files: from the Hub, or offline from what was noted and cached.

Nothing is downloaded here. A repo with pickled weights only is replaced by its conversion where there is one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import huggingface_hub  # its names are loaded when they are used, which a merge of local folders never does
from huggingface_hub import constants

from hf_epimer.errors import AccessError, HubError, NotFoundError
from hf_epimer.hub.conversion import BOT, Conversion, find_conversion, is_convertible
from hf_epimer.hub.notes import cached_commit, read_note, write_note
from hf_epimer.hub.refs import ModelRef, is_repo_id
from hf_epimer.hub.retry import persist
from hf_epimer.hub.source import CARD, Source
from hf_epimer.outside import LARGEST_LISTING, parse_json, read_text

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


def resolve(ref: ModelRef) -> Source:
    """Look a reference up: which commit, which files. Nothing is downloaded.

    A repo with pickled weights only is replaced by its conversion where there is one.

    Raises:
        NotFoundError: no such folder, repo, subfolder or revision, or private without a token that may read it.
        AccessError: gated, or the token is not valid.
        HubError: the Hub cannot be reached.
    """
    label = ref.label or ref.name
    if ref.is_local:
        folder = Path(ref.location)
        if not folder.is_dir():
            raise NotFoundError(f"{ref}: {folder} is not a folder")
        try:
            paths = [path for path in folder.iterdir() if path.is_file()]
        except PermissionError as error:
            raise AccessError(f"{ref}: the folder may not be read (permission denied)") from error
        return Source(ref, label, frozenset(p.name for p in paths), {p.name: p.stat().st_size for p in paths})
    return _within(ref, _resolve_offline(ref, label) if constants.HF_HUB_OFFLINE else _resolve_online(ref, label))


def _resolve_online(ref: ModelRef, label: str) -> Source:
    """As the Hub has it now; what it says is noted for working offline."""
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


def _within(ref: ModelRef, repo: Source) -> Source:
    """What lies in the subfolder that a reference names, and the repo's card; all of the repo where it names none."""
    if ref.subfolder is None:
        return repo
    inside = f"{ref.subfolder}/"

    def below(of_files: Mapping[str, Value]) -> dict[str, Value]:
        card = {name: value for name, value in of_files.items() if name == CARD}
        return {name.removeprefix(inside): of_files[name] for name in of_files if name.startswith(inside)} | card

    if not any(name.startswith(inside) for name in repo.files):
        folders = sorted({name.rpartition("/")[0] for name in repo.files if "/" in name})
        raise NotFoundError(f"{ref}: there is no such folder in the repo, which has {', '.join(folders[:6]) or 'none'}")
    return replace(
        repo,
        ref=replace(repo.ref, subfolder=ref.subfolder),
        files=frozenset(below(dict.fromkeys(repo.files))),
        sizes=below(repo.sizes),
        sha256=below(repo.sha256),
        blob_ids=below(repo.blob_ids),
        intact={},
    )


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
    inside = f"{ref.subfolder}/" if ref.subfolder else ""
    configs = (f"{inside}config.json", f"{inside}adapter_config.json")  # of a checkpoint, of an adapter
    found = [huggingface_hub.try_to_load_from_cache(ref.location, name, revision=commit) for name in configs if commit]
    config = next((path for path in found if isinstance(path, str)), None)
    if config is None:
        raise HubError(f"{ref}: not in the local cache, and HF_HUB_OFFLINE is set")
    paths = [path for path in Path(config).parent.iterdir() if path.is_file()]
    names = {path.name for path in paths}
    names |= _expected_beside(names, Path(config).parent)
    return Source(
        ModelRef(ref.location, commit, ref.label),
        label,
        frozenset(inside + name for name in names),
        {inside + path.name: path.stat().st_size for path in paths},
        is_listed=False,
    )


def _expected_beside(names: set[str], folder: Path) -> set[str]:
    if "adapter_config.json" in names:
        return {"adapter_model.safetensors"}
    if "model.safetensors.index.json" not in names:
        return {"model.safetensors"}
    try:
        index = read_text(folder / "model.safetensors.index.json", LARGEST_LISTING)
        return set(parse_json(index)["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return set()  # whoever reads the index says what is wrong with it
