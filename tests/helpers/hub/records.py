"""What the stand-in keeps and exchanges: repositories with their history, users, requests, answers, faults."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


@dataclass
class Request:
    """One request as received, with the status that was decided for it (even where a fault then hid it)."""

    method: str
    path: str
    status: int
    has_token: bool
    headers: dict[str, str]


@dataclass
class Fault:
    """A misbehaviour for the requests that match; the oldest matching fault with uses left applies."""

    method: str = "*"
    path: str = ""
    status: int | None = None  # answer this instead of performing the request
    times: int | None = 1  # None: for ever
    headers: dict[str, str] = field(default_factory=dict)  # also laid over the right answer when status is None
    body: bytes = b""
    cut_after: int | None = None  # send this many bytes of the body under its full Content-Length, then close
    reset: bool = False  # break the connection before anything is done
    delay: float = 0.0
    drop_answer: bool = False  # perform the request, then close the connection without an answer
    corrupt: bool = False  # flip one byte in the middle of the served body
    after: int = 0  # so many matching requests are served rightly first
    hits: int = 0

    def matches(self, method: str, path: str) -> bool:
        spent = self.times is not None and self.hits >= self.times
        return not spent and self.method in ("*", method) and re.search(self.path, path) is not None


@dataclass(frozen=True)
class Blob:
    """One version of a file; ``git_oid`` is that of the pointer for an LFS file, as on the Hub."""

    path: Path
    size: int
    sha256: str
    git_oid: str
    lfs: bool
    pointer_size: int


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: dict[str, Blob]


@dataclass
class PullRequest:
    num: int
    title: str
    author: str
    revision: str
    base: str
    url: str
    date: str
    status: str = "open"
    description: str = ""


@dataclass
class User:
    token: str
    name: str
    role: str
    orgs: dict[str, str]
    scopes: dict[str, list[str]]


@dataclass
class Repo:
    id: str
    type: str
    private: bool
    gated: bool
    granted: set[str]
    date: str
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" -> commit oid
    commits: dict[str, Commit] = field(default_factory=dict)
    pulls: list[PullRequest] = field(default_factory=list)
    uploaded: set[str] = field(default_factory=set)  # sha256 of the LFS objects this repo holds

    def record(self, ref: str, parent: str | None, tree: dict[str, Blob], title: str, text: str, author: str) -> Commit:
        content = [self.type, self.id, parent, title, text, sorted((p, b.git_oid) for p, b in tree.items())]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        commit = self.commits[oid] = Commit(oid, parent, title, text, author, now(), dict(sorted(tree.items())))
        self.refs[ref] = oid
        return commit

    def history(self, commit: Commit) -> list[Commit]:
        found = [commit]
        while found[-1].parent:
            found.append(self.commits[found[-1].parent])
        return found

    def ref(self, revision: str) -> str | None:
        return next((ref for ref in (revision, f"refs/heads/{revision}") if ref in self.refs), None)

    def commit_at(self, revision: str) -> Commit:
        if ref := self.ref(revision):
            return self.commits[self.refs[ref]]
        full = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        if len(full) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[full[0]]


@dataclass
class Call:
    """A request about one repo; ``first`` and ``rest`` are what follows the action: mostly a revision and a path."""

    repo: Repo
    user: User | None
    first: str
    rest: str
    query: dict[str, list[str]]
    data: bytes


@dataclass
class Answer:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Path = b""
    start: int = 0
    length: int = 0

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
        body = json.dumps(value).encode()
        return cls(status, {"Content-Type": "application/json", **(headers or {})}, body, 0, len(body))

    def chunks(self) -> Iterator[bytes]:
        if isinstance(self.body, bytes):
            yield self.body
            return
        with self.body.open("rb") as file:
            file.seek(self.start)
            left = self.length
            while left and (chunk := file.read(min(CHUNK, left))):
                left -= len(chunk)
                yield chunk


class HubError(Exception):
    """A refusal, in the form the client turns into its own exception types."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        code_header = {"X-Error-Code": code} if code else {}
        self.answer = Answer.json({"error": message}, status, {"X-Error-Message": message, **code_header, **named})
