"""Which files of a folder this program wrote: what may be replaced, and what may be published.

Every command that writes a folder leaves a record in it, a JSON object. Its key `files` is the manifest: the size of
every other file, and the sha256 of those that are small.

    {"method": "epimer", ..., "files": {"README.md": {"size": 2211, "sha256": "9f86..."}, "model.safetensors": ...}}

A file that is not listed, or is not as it was written, is somebody's own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hf_epimer.checkpoints.atomic import write_text
from hf_epimer.checkpoints.reader import WEIGHT_NAMES, WEIGHTS, check_whole
from hf_epimer.errors import CheckpointError, OutputError
from hf_epimer.outside import LARGEST_LISTING, Unreadable, exists, parse_json, read_text

FILES = "files"
"""The key of the manifest in a record."""

_HASHED = 8 * 2**20
"""Bytes up to which a file's content is noted, too; of larger ones, which are weights, the size has to do."""

_LARGEST_RECORD = 256 * 2**20


@dataclass(frozen=True)
class _Record:
    """How a command's record is recognised.

    Attributes:
        format: the beginning of its key `format`; empty for merge_config.json, which has none.
        keys: that it has.
        before: the names of files that were written beside it before records had a manifest.
    """

    format: str
    keys: tuple[str, ...]
    before: re.Pattern[str]


_OF_MERGES = "merge_config.json"

RECORDS = {
    _OF_MERGES: _Record(
        "",
        ("method", "models", "options", "versions"),
        re.compile(
            r"(README\.md|(adapter_)?config\.json|preprocessor_config\.json|merge_report\.json|results\.json"
            r"|(adapter_)?model\.safetensors|model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json)"
        ),
    ),
    "diagnosis.json": _Record("hf-epimer.diagnosis/", ("verdict", "layers"), re.compile(r"\w+\.png")),
    "sweep.json": _Record("hf-epimer.sweep/", ("base", "models"), re.compile(r"sweep\.(csv|md)|\w+\.png")),
    "conversion.json": _Record("hf-epimer.conversion/", ("source",), re.compile(r"(?!)")),  # always had a manifest
    "landscape.json": _Record("hf-epimer.landscape/", ("base", "models"), re.compile(r"\w+\.png")),
}
"""The records by name: of merge, diagnose, sweep and the loss landscape."""


@dataclass(frozen=True)
class Manifest:
    """What a record says of its folder.

    Attributes:
        record: the record's own name.
        files: name -> size and, where it is known, sha256; None of a folder from before records had a manifest.
    """

    record: str
    files: Mapping[str, Mapping[str, Any]] | None

    def why_foreign(self, folder: Path, name: str) -> str | None:
        """Why a file is not, or not any more, what this program wrote; None where it is."""
        if name == self.record:
            return None
        if self.files is None:
            return None if RECORDS[self.record].before.fullmatch(name) else "was not written by hf-epimer"
        if name not in self.files:
            return "was not written by hf-epimer"
        return None if _entry(folder / name) == dict(self.files[name]) else "was changed after hf-epimer wrote it"


def seal(folder: Path, record: str) -> None:
    """Enter every file of a folder, all of them written by this program, into its record."""
    content = _read_record(folder, record)
    names = [name for name in _names(folder) if name != record]
    content[FILES] = {name: _entry(folder / name) for name in names}
    (folder / record).write_text(_as_text(content), encoding="utf-8")


@contextmanager
def entering(file: Path) -> Iterator[None]:
    """Enter a file that the block writes into a folder which has been sealed before; where there is no record, nothing.

    One that somebody else had written, or changed, stays theirs.

    Raises:
        OutputError: the record cannot be written.
    """
    manifest = read_manifest(file.parent)
    if manifest is None or manifest.files is None or file.name == manifest.record:
        yield
        return
    is_ours = not exists(file) or manifest.why_foreign(file.parent, file.name) is None
    yield
    if is_ours:
        content = _read_record(file.parent, manifest.record)
        content[FILES][file.name] = _entry(file)
        write_text(file.parent / manifest.record, _as_text(content))


def read_manifest(folder: Path) -> Manifest | None:
    """What the record in a folder says; None without one, or with one that is no record of this program."""
    for name, kind in RECORDS.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            continue
        try:
            content = _read_record(folder, name)
        except (Unreadable, OSError):
            continue
        is_ours = str(content.get("format", "")).startswith(kind.format) and all(key in content for key in kind.keys)
        is_ours = is_ours and isinstance(content.get("models", []), list)
        files = content.get(FILES)
        if is_ours and (files is None or _is_well_formed(files)):
            return Manifest(name, files)
    return None


def find_foreign(folder: Path) -> str | None:
    """The first thing in a folder that this program did not write, and why it counts as foreign; None if all is ours.

    Links, and folders without a file of ours, are foreign whatever they are called.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return "it has no record of hf-epimer (" + ", ".join(RECORDS) + ")"
    known = set(manifest.files or ())
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            return f"{name} is a link"
        if path.is_dir():
            if not any(other.startswith(f"{name}/") for other in known):
                return f"{name}/ was not written by hf-epimer"
        elif not path.is_file():
            return f"{name} is no ordinary file"
        elif why := manifest.why_foreign(folder, name):
            return f"{name} {why}"
    return None


def remove_ours(folder: Path) -> bool:
    """Delete what this program wrote into a folder and then the folder; whatever else has come into it stays.

    Returns:
        Whether it is gone.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    for path in sorted(_walk(folder), reverse=True):  # what lies in a folder before the folder
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            _remove_empty(path)
        elif name != manifest.record and not path.is_symlink() and not manifest.why_foreign(folder, name):
            with suppress(OSError):
                path.unlink()
    if any(path.name != manifest.record for path in folder.iterdir()):
        return False
    (folder / manifest.record).unlink()  # last: as long as anything is there, it says whose it is
    return _remove_empty(folder)


def publishable(folder: Path) -> list[str]:
    """The names of the files of a merged folder that may be pushed: those that a merge wrote, and all of them.

    A card or config that was edited since is published as it is now.

    Raises:
        OutputError: a file is missing, is a link, or is cut: nothing of the folder should be pushed.
    """
    manifest = read_manifest(folder)
    if manifest is None or manifest.record != _OF_MERGES:
        what = "its merge_config.json is no recipe" if exists(folder / _OF_MERGES) else "there is no merge_config.json"
        raise OutputError(f"{folder} is no merged folder: {what}")
    if manifest.files is None:
        names = [name for name in _names(folder) if manifest.why_foreign(folder, name) is None]
    else:
        names = [*manifest.files, manifest.record]
    again = "the merge must be made again before it can be pushed"
    for name in names:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            what = "is a link" if path.is_symlink() else "is missing"
            raise OutputError(f"{folder}: {name}, which the merge wrote, {what}: {again}")
        if name.endswith(".safetensors"):
            noted = (manifest.files or {}).get(name, {}).get("size", path.stat().st_size)
            if path.stat().st_size != noted:
                raise OutputError(f"{folder}: {name} has {path.stat().st_size} bytes instead of {noted}: {again}")
            try:
                check_whole(path, str(folder))
            except CheckpointError as error:
                raise OutputError(f"{error}; {again}") from error
    _check_weights(folder, names, again)
    return sorted(names)


def _check_weights(folder: Path, names: list[str], again: str) -> None:
    """There are weights, and every shard that an index names is among them."""
    index = next((name for name in names if name.endswith(".safetensors.index.json")), None)
    whole = next((name for name in WEIGHT_NAMES if name in names), WEIGHTS)
    needed = [] if index else ["adapter_model.safetensors" if "adapter_config.json" in names else whole]
    if index:
        try:
            needed = sorted(set(parse_json(read_text(folder / index, LARGEST_LISTING))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(f"{folder}: {index} is no index of shards ({error}): {again}") from error
    for name in needed:
        if name not in names:
            raise OutputError(f"{folder}: {name} is missing: {again}")


def _entry(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _HASHED:
        return {"size": size}
    return {"size": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _read_record(folder: Path, record: str) -> dict[str, Any]:
    content = parse_json(read_text(folder / record, _LARGEST_RECORD))
    if not isinstance(content, dict):
        raise Unreadable("it is no JSON object")
    return content


def _as_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _is_well_formed(files: Any) -> bool:
    """Names below the folder, each with a size: a manifest may come from a stranger."""
    return isinstance(files, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
        and "\\" not in name
        for name, entry in files.items()
    )


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in _walk(folder) if not path.is_dir())


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder; links are not followed."""
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def _remove_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:  # something is in it
        return False
    return True
