"""Writing a result: one tensor at a time, and all or nothing.

The header of a safetensors file holds all names, shapes and offsets, so it can be written before the tensors are known;
they are then streamed behind it and never held together. A folder is built as a temporary sibling and renamed at the
end: under its own name it is complete or not there.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from hf_epimer.errors import OutputError


def check_target(folder: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a folder that cannot become the result, before any work.

    Args:
        inputs: local files and folders the merge reads; overwriting may not take them away.

    Raises:
        OutputError: it is a file, a non-empty folder without `overwrite`, holds an input or the working directory, or
            its parent cannot be written to.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--out {folder} is a file, not a folder")
    for kept in (Path.cwd(), *inputs):
        if folder.exists() and Path(os.path.realpath(kept)).is_relative_to(folder) and any(folder.iterdir()):
            raise OutputError(f"--out {folder} holds {kept}, which would be lost: choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(f"--out {folder} exists and is not empty: choose another folder or add --overwrite")
    parent = folder.absolute().parent
    existing = next(path for path in (parent, *parent.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        raise OutputError(f"--out {folder}: cannot write to {existing}")


@contextlib.contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends well and disappears when it does not.

    What a killed process left behind is removed by the next run.

    Raises:
        OutputError: the disk is full, the folder cannot be written, or something else has meanwhile been put there.
    """
    target = Path(os.path.realpath(target))
    partial = target.parent / f".{target.name}.partial-{os.getpid()}.{secrets.token_hex(3)}"
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        partial.mkdir()
        yield partial
        _install(partial, target, overwrite)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in missing:  # only empty folders go, from the innermost outwards
                parent.rmdir()


def _install(partial: Path, target: Path, overwrite: bool) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        os.replace(partial, target)
        return
    if not overwrite:
        raise OutputError(f"{target} was filled by something else during the merge; merge again to another folder")
    replaced = partial.with_name(partial.name + ".old")
    os.replace(target, replaced)
    os.replace(partial, target)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    for path in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        process = path.name.rsplit("partial-", 1)[1].split(".")[0]
        if process.isdigit() and not _alive(int(process)):
            if path.name.endswith(".old") and not target.exists():
                os.replace(path, target)  # killed between the two renames of an overwrite: the old result comes back
            else:
                shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {target}: {reason}; nothing was left there") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
