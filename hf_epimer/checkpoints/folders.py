"""Writing a folder: complete or not there, and in the place of nothing but what this program wrote itself.

A folder is built as a temporary sibling. Where an older result is to be replaced, the two change places in one step of
the file system where it can (`renameat2` with RENAME_EXCHANGE, on Linux), so that a complete folder is under the name
at any moment; elsewhere by two renames, which are undone when the second fails, and by the next run when the first was
the last that a killed run did. The old folder is then taken away file by file, as its manifest lists them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import constants

from hf_epimer.checkpoints.atomic import remove_abandoned, unfinished_sibling
from hf_epimer.checkpoints.manifest import find_foreign, read_manifest, remove_ours, seal
from hf_epimer.errors import OutputError
from hf_epimer.outside import exists

logger = logging.getLogger(__name__)


def check_target(folder: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a folder that cannot become the result, before any work. Links and `..` are resolved first.

    Args:
        overwrite: replace a folder that this program wrote.
        inputs: local files and folders the merge reads; overwriting may not take them away.

    Raises:
        OutputError: it is a file, a non-empty folder without `overwrite`, one that holds something of somebody else,
            an input, the working directory or the user's home, a root or a mount point, or its parent cannot be
            written to.
    """
    try:
        target = Path(os.path.realpath(folder))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            target.lstat()  # a name that is too long, or a folder that may not be looked into, is found out here
        shown = f"--out {folder}" if folder.absolute() == target else f"--out {folder} (which is {target})"
        _check_target(target, shown, overwrite, inputs)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"--out {folder} cannot be used: {reason}") from error


@contextlib.contextmanager
def atomic_folder(target: Path, record: str, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends well and disappears when it does not.

    What a killed run left behind is removed by the next one, or put back.

    Args:
        record: the JSON file of the block's that all its files are entered in (see `manifest`).
        overwrite: replace a folder that this program wrote.

    Raises:
        OutputError: the disk is full, the folder cannot be written, or something else has meanwhile been put there.
    """
    target = Path(os.path.realpath(target))
    missing = [parent for parent in target.parents if not exists(parent)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target, lambda path: _put_back_or_remove(path, target))
        if not overwrite and _is_filled(target):
            raise OutputError(
                f"{target} exists and is not empty (a run was killed while it replaced it, and it is back now): choose "
                "another folder or add --overwrite"
            )
        with unfinished_sibling(target, Path.mkdir) as partial:
            try:
                yield partial
                seal(partial, record)
                _install(partial, target, overwrite)
            finally:
                _remove(partial)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}; nothing was left there") from error
    finally:
        with contextlib.suppress(OSError):
            for parent in missing:  # only empty folders go, from the innermost outwards
                parent.rmdir()


def _check_target(folder: Path, shown: str, overwrite: bool, inputs: Iterable[Path]) -> None:
    _refuse_protected(folder, shown)
    if exists(folder) and not folder.is_dir():
        raise OutputError(f"{shown} is a file, not a folder")
    is_filled = _is_filled(folder)
    for kept in (Path.cwd(), *inputs):
        if is_filled and Path(os.path.realpath(kept)).is_relative_to(folder):
            raise OutputError(f"{shown} holds {kept}, which would be lost: choose another folder")
    if is_filled and not overwrite:
        raise OutputError(f"{shown} exists and is not empty: choose another folder or add --overwrite")
    if is_filled:
        _refuse_foreign(folder, shown)
    existing = next(path for path in folder.parents if exists(path))
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        raise OutputError(f"{shown}: cannot write to {existing}")


def _refuse_protected(folder: Path, shown: str) -> None:
    """Places that are never a result's, whatever is in them."""
    if folder == folder.parent:
        raise OutputError(f"{shown} is a root: choose a folder below it")
    homes = {os.path.expanduser("~"): "your home folder", **_home_of_user()}
    for place, what in {**homes, constants.HF_HOME: "HF_HOME", constants.HF_HUB_CACHE: "the Hub's cache"}.items():
        if Path(os.path.realpath(place)).is_relative_to(folder):
            raise OutputError(f"{shown} is or holds {what} ({place}): choose another folder")
    if os.path.ismount(folder):
        raise OutputError(f"{shown} is a mount point, which cannot be replaced: choose a folder in it")


def _home_of_user() -> dict[str, str]:
    """The home that the system knows of, whatever HOME says."""
    try:
        import pwd

        return {pwd.getpwuid(os.getuid()).pw_dir: "your home folder"}
    except (ImportError, KeyError):  # Windows; a user without an entry, as in containers
        return {}


def _refuse_foreign(folder: Path, shown: str) -> None:
    if why := find_foreign(folder):
        raise OutputError(
            f"{shown} is not replaced, for only folders that hf-epimer wrote are: {why}; choose another folder, or "
            "move that away"
        )


def _install(partial: Path, target: Path, overwrite: bool) -> None:
    """Give `partial` the name of `target`."""
    if not exists(target) or (target.is_dir() and not _is_filled(target)):
        os.replace(partial, target)  # fails where something has been put there in this moment
        return
    if not overwrite:
        raise OutputError(f"{target} was filled by something else during the merge; merge again to another folder")
    _refuse_foreign(target, str(target))
    if _exchange(partial, target):
        replaced = partial
    else:
        replaced = partial.with_name(f"{partial.name}.old")
        try:
            os.replace(target, replaced)
            os.replace(partial, target)
        except BaseException:
            if exists(replaced) and not exists(target):
                os.replace(replaced, target)
            raise
    if not remove_ours(replaced):
        kept = target.with_name(f"{target.name}-replaced-{secrets.token_hex(3)}")
        os.replace(replaced, kept)
        logger.warning("%s: not all of what it held could be taken away; the rest is in %s", target, kept)


def _is_filled(folder: Path) -> bool:
    return exists(folder) and any(folder.iterdir())


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _put_back_or_remove(path: Path, target: Path) -> None:
    """The leftover of a killed run: the old result where it was between its two renames, else half of a new one."""
    if path.name.endswith(".old") and not exists(target):
        os.replace(path, target)
    else:
        _remove(path)


def _remove(folder: Path) -> None:
    """Take an unfinished folder away: a result by its manifest, half of one, which nobody else knows, at once."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.files is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        remove_ours(folder)
