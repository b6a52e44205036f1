"""The contents of files, each kept once under its sha256, and what git and LFS would call them."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

from helpers.hub.records import CHUNK, Blob, Repo

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".png")
LFS_THRESHOLD = 10 * 1024 * 1024


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_THRESHOLD)


class Store:
    """Files in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def keep(self, content: bytes | Path | Iterable[bytes]) -> Path:
        """Keep content under its sha256, streamed, so that equal files are held once and never change."""
        if isinstance(content, Path):
            with content.open("rb") as file:
                return self.keep(iter(lambda: file.read(CHUNK), b""))
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.root, delete=False) as out:
            for chunk in [content] if isinstance(content, bytes) else content:
                digest.update(chunk)
                out.write(chunk)
        return Path(out.name).replace(self.root / digest.hexdigest())

    def blob(self, repo: Repo, path: str, stored: Path, lfs: bool | None = None) -> Blob:
        size, sha256 = stored.stat().st_size, stored.name
        if not (is_lfs(path, size) if lfs is None else lfs):
            return Blob(stored, size, sha256, git_oid(stored.read_bytes()), False, 0)
        repo.uploaded.add(sha256)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return Blob(stored, size, sha256, git_oid(pointer), True, len(pointer))
