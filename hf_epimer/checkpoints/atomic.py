"""Writing a file: all of it under its name, or nothing.

What is being written lies beside its target as `.NAME.partial-PROCESS.RANDOM`, locked for as long as its writer lives.
What a killed run left is not locked any more, and the next run that writes the same target takes it away.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from hf_epimer.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LONGEST_NAME = 200
"""Bytes of a file's name to which a suffix can still be added on every file system."""


def write_text(file: Path, text: str) -> None:
    """Write a text file whole: it appears under its name, or changes, only when all of it is on the disk.

    Raises:
        OutputError: it cannot be written.
    """
    with atomic_file(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends well and disappears when it does not.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target, lambda path: path.unlink(missing_ok=True))
        with unfinished_sibling(target, lambda path: path.touch(exist_ok=False)) as unfinished:
            try:
                yield unfinished
                os.replace(unfinished, target)
            finally:
                with contextlib.suppress(OSError):
                    unfinished.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {target}: {reason}; nothing was left there") from error


@contextlib.contextmanager
def unfinished_sibling(target: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """A new file or folder beside `target`, made by `create` and locked while the block lasts; it is not removed.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        path = target.with_name(f"{_stem(target)}{os.getpid()}.{secrets.token_hex(3)}")
        create(path)
        with locked(path, wait=True):
            if path.exists():  # else another run took it for abandoned, between the two lines above
                yield path
                return


def remove_abandoned(target: Path, remove: Callable[[Path], None]) -> None:
    """Give every unfinished sibling of `target` whose run was killed to `remove`.

    Links of such a name are nobody's work of ours and left alone.
    """
    for path in target.parent.glob(f"{glob.escape(_stem(target))}*"):
        process = path.name.removeprefix(_stem(target)).split(".")[0]
        if not process.isdigit() or path.is_symlink():
            continue
        with contextlib.suppress(OSError, Busy), locked(path) as is_sure:  # another user's is left alone
            if is_sure or not _alive(int(process)):
                remove(path)


def _stem(target: Path) -> str:
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:40]
    return f".{name}.partial-"


class Busy(Exception):
    """Somebody else holds the lock."""


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a file or folder; False where the system has no such locks.

    A lock disappears with its process, whatever ends it, and is seen by other machines and containers, where process
    numbers mean nothing.

    Raises:
        Busy: somebody else holds it, unless we `wait`.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_locked = True
        except BlockingIOError as error:
            raise Busy from error
        except OSError:  # some network file systems
            is_locked = False
        yield is_locked
    finally:
        os.close(descriptor)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
