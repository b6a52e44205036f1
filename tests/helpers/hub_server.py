"""A local stand-in for the Hugging Face Hub, for tests that drive the real ``huggingface_hub`` client.

It speaks the part of the Hub's HTTP interface that the client uses to read and write repositories (without Xet:
set ``HF_HUB_DISABLE_XET=1``), keeps repositories in a temporary folder, and can be told to misbehave (``Fault``).

Known differences from the real Hub: a large file is served directly instead of through a redirect to a CDN; lists
are not paginated; a refused anonymous request always carries ``X-Error-Code`` because the client guesses
"repository not found" from a bare 401 only for https addresses.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import socket
import struct
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".png")
LFS_THRESHOLD = 10 * 1024 * 1024
LOGGED_HEADERS = ("Range", "User-Agent", "Content-Length", "Content-Type")
CHUNK = 1 << 20
WRITER, READER, STRANGER = "hf_writer_secret", "hf_reader_secret", "hf_stranger_secret"
Files = Mapping[str, "bytes | Path | None"]

API_PATH = re.compile(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/([^/]+))?(?:/([^/]+))?(?:/(.+))?")
LEGACY_PATH = re.compile(r"/api/(dataset)s/([^/]+)(?:/revision/.+)?")
RESOLVE_PATH = re.compile(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/(?:resolve|raw)/([^/]+)/(.+)")
LFS_PATH = re.compile(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)\.git/info/lfs/(.+)")


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


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_THRESHOLD)


def _front_matter(text: str) -> Any:
    """The metadata block of a README, None when it has none; raises yaml.YAMLError when it cannot be read."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


class StandInHub:
    """The stand-in, listening on a free port of 127.0.0.1 while its ``with`` block lasts."""

    def __enter__(self) -> StandInHub:
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.users: dict[str, User] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.moved: dict[tuple[str, str], str] = {}  # old id in small letters -> new id
        self.signature = ""  # a query on the addresses that files are sent to
        self.lock = threading.RLock()
        self.closed = False
        self._root = Path(tempfile.mkdtemp(prefix="stand-in-hub-"))
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.closed = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        shutil.rmtree(self._root, ignore_errors=True)

    # What a test says and asks directly

    def add_user(
        self,
        token: str,
        name: str,
        *,
        role: str = "write",
        orgs: Mapping[str, str] | Iterable[str] = (),
        scopes: Mapping[str, list[str]] | None = None,
    ) -> None:
        """Orgs map a name to the role in it ("write" for a plain list); scopes are those of a fineGrained token,
        from a namespace or repo id to permissions such as ``repo.content.read`` and ``repo.write``."""
        roles = dict(orgs) if isinstance(orgs, Mapping) else dict.fromkeys(orgs, "write")
        self.users[token] = User(token, name, role, roles, dict(scopes or {}))

    def add_repo(
        self,
        repo_id: str,
        files: Files | Path,
        *,
        repo_type: str = "model",
        private: bool = False,
        gated: bool = False,
        granted: Iterable[str] = (),
        message: str = "init",
    ) -> str:
        """Create a repo with one commit and return its oid; ``granted`` names the users let through the gate."""
        with self.lock:
            self.repos[repo_type, repo_id] = Repo(repo_id, repo_type, private, gated, set(granted), _now())
        return self.commit(repo_id, files, repo_type=repo_type, message=message)

    def commit(
        self,
        repo_id: str,
        files: Files | Path,
        *,
        repo_type: str = "model",
        revision: str = "main",
        message: str = "update",
        author: str = "hub",
    ) -> str:
        """Commit straight into a branch, as another writer would; a file given as None is deleted."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p for p in sorted(files.rglob("*")) if p.is_file()}
        with self.lock:
            repo = self.repos[repo_type, repo_id]
            ref = self._ref(repo, revision) or f"refs/heads/{revision}"
            parent = repo.refs.get(ref)
            tree = dict(repo.commits[parent].files) if parent else {}
            for path, content in files.items():
                if content is None:
                    del tree[path]
                else:
                    tree[path] = self._blob(repo, path, self._store(content))
            return self._record(repo, ref, parent, tree, message, "", author).oid

    def open_pull_request(
        self,
        repo_id: str,
        files: Files,
        *,
        title: str,
        author: str,
        base: str = "main",
        description: str = "",
        repo_type: str = "model",
    ) -> PullRequest:
        """A pull request on a commit, with one commit of its own."""
        with self.lock:
            repo = self.repos[repo_type, repo_id]
            head = self._commit_at(repo, base)
            pull = self._new_pull_request(repo, title, author, f"refs/heads/{base}", description)
            repo.refs[pull.revision] = head.oid
            self.commit(repo_id, files, repo_type=repo_type, revision=pull.revision, message=title, author=author)
        return pull

    def rename(self, old: str, new: str, repo_type: str = "model") -> None:
        """Move a repo; its old name goes on as a redirection."""
        with self.lock:
            repo = self.repos[repo_type, new] = self.repos.pop((repo_type, old))
            repo.id = new
            self.moved[repo_type, old.lower()] = new

    def commits(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> list[Commit]:
        """The history of a revision, newest first."""
        with self.lock:
            repo = self.repos[repo_type, repo_id]
            return self._history(repo, self._commit_at(repo, revision))

    def read(self, repo_id: str, path: str, revision: str = "main", repo_type: str = "model") -> bytes:
        return self.commits(repo_id, repo_type, revision)[0].files[path].path.read_bytes()

    def exists(self, repo_id: str, repo_type: str = "model") -> bool:
        return (repo_type, repo_id) in self.repos

    def pull_requests(self, repo_id: str, repo_type: str = "model") -> list[PullRequest]:
        return list(self.repos[repo_type, repo_id].pulls)

    def inject(self, fault: Fault) -> Fault:
        with self.lock:
            self.faults.append(fault)
        return fault

    def clear_log(self) -> None:
        with self.lock:
            self.requests.clear()

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.matches(method, path):
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.hits += 1
                    return fault
        return None

    # Content and history

    def _store(self, content: bytes | Path | Iterable[bytes]) -> Path:
        """Keep content under its sha256, streamed, so that equal files are held once and never change."""
        if isinstance(content, Path):
            with content.open("rb") as file:
                return self._store(iter(lambda: file.read(CHUNK), b""))
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self._root, delete=False) as out:
            for chunk in [content] if isinstance(content, bytes) else content:
                digest.update(chunk)
                out.write(chunk)
        return Path(out.name).replace(self._root / digest.hexdigest())

    def _blob(self, repo: Repo, path: str, stored: Path, lfs: bool | None = None) -> Blob:
        size, sha256 = stored.stat().st_size, stored.name
        if not (_is_lfs(path, size) if lfs is None else lfs):
            return Blob(stored, size, sha256, _git_oid(stored.read_bytes()), False, 0)
        repo.uploaded.add(sha256)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return Blob(stored, size, sha256, _git_oid(pointer), True, len(pointer))

    def _record(
        self, repo: Repo, ref: str, parent: str | None, tree: dict[str, Blob], title: str, text: str, author: str
    ) -> Commit:
        content = [repo.type, repo.id, parent, title, text, sorted((p, b.git_oid) for p, b in tree.items())]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        commit = repo.commits[oid] = Commit(oid, parent, title, text, author, _now(), dict(sorted(tree.items())))
        repo.refs[ref] = oid
        return commit

    def _history(self, repo: Repo, commit: Commit) -> list[Commit]:
        found = [commit]
        while found[-1].parent:
            found.append(repo.commits[found[-1].parent])
        return found

    def _ref(self, repo: Repo, revision: str) -> str | None:
        return next((ref for ref in (revision, f"refs/heads/{revision}") if ref in repo.refs), None)

    def _commit_at(self, repo: Repo, revision: str) -> Commit:
        if ref := self._ref(repo, revision):
            return repo.commits[repo.refs[ref]]
        full = [oid for oid in repo.commits if len(revision) >= 7 and oid.startswith(revision)]
        if len(full) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.commits[full[0]]

    # Who may do what

    def _user(self, headers: Mapping[str, str]) -> User | None:
        given = headers.get("Authorization")
        if given is None:
            return None
        user = self.users.get(given.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def _allowed(self, user: User, repo_id: str, permission: str, roles: tuple[str, ...]) -> bool:
        namespace = repo_id.split("/")[0]
        member = namespace == user.name or user.orgs.get(namespace) in roles
        scoped = any(permission in user.scopes.get(entity, ()) for entity in (namespace, repo_id))
        return member and (user.role != "fineGrained" or scoped)

    def _can_write(self, user: User, repo_id: str) -> bool:
        return user.role != "read" and self._allowed(user, repo_id, "repo.write", ("write", "admin"))

    def _can_see(self, user: User, repo_id: str) -> bool:
        member = self._allowed(user, repo_id, "repo.content.read", ("read", "contributor", "write", "admin"))
        return member or self._can_write(user, repo_id)

    def _repo(self, user: User | None, repo_type: str | None, repo_id: str, *, content: bool = False) -> Repo:
        """The repo if this user may know of it, and with ``content`` if the gate is open to them."""
        repo = self.repos.get((repo_type or "model", unquote(repo_id)))
        if repo is None or (repo.private and not (user and self._can_see(user, repo.id))):
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        inside = user is not None and (user.name in repo.granted or self._can_see(user, repo.id))
        if content and repo.gated and not inside:
            message = f"Access to {repo.type} {repo.id} is restricted and you are not in the authorized list."
            raise HubError(403 if user else 401, message, "GatedRepo")
        return repo

    def _writer(self, user: User | None, repo: Repo, *, as_pull_request: bool = False) -> User:
        if user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if user.role == "read":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if not as_pull_request and not self._can_write(user, repo.id):
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return user

    # Requests

    def dispatch(self, method: str, target: str, headers: Mapping[str, str], body: Iterator[bytes]) -> Answer:
        path, _, query_text = target.partition("?")
        query = parse_qs(query_text)
        if method == "PUT" and (match := LFS_PATH.fullmatch(path)):
            return self._receive_lfs(self.repos[match[1] or "model", match[2]], match[3].split("/")[-1], body)
        data = b"".join(body)
        with self.lock:
            user = self._user(headers)
            if elsewhere := self._redirection(path):
                target = f"{elsewhere}?{query_text}" if query_text else elsewhere
                return Answer(307, {"Location": target})
            if match := API_PATH.fullmatch(path):
                repo_type, repo_id, action, first, rest = match.groups()
                handler: Callable[[Call], Answer] | None
                handler = getattr(self, f"_{method.lower()}_{(action or 'revision').replace('-', '_')}", None)
                if handler is not None:
                    repo = self._repo(user, repo_type, repo_id)
                    return handler(Call(repo, user, unquote(first or ""), unquote(rest or ""), query, data))
            elif match := LFS_PATH.fullmatch(path):
                return self._lfs(self._repo(user, match[1], match[2]), user, match[3], json.loads(data))
            elif method in ("GET", "HEAD") and (match := RESOLVE_PATH.fullmatch(path)):
                repo = self._repo(user, match[1], match[2], content=True)
                return self._resolve(repo, unquote(match[3]), unquote(match[4]), headers.get("Range"))
            elif (method, path) == ("GET", "/api/whoami-v2"):
                return self._whoami(user)
            elif (method, path) == ("POST", "/api/validate-yaml"):
                return self._validate_yaml(json.loads(data)["content"])
            elif (method, path) in (("POST", "/api/repos/create"), ("DELETE", "/api/repos/delete")):
                return self._create_or_delete(user, method, json.loads(data))
        raise HubError(404, f"Sorry, we can't find {method} {path}")

    def _redirection(self, path: str) -> str | None:
        """The same address under the name that a repo has now, if it was asked for by another: the Hub's names ignore
        case, and a renamed repo goes on under its old name, as do data sets from the time when some had no owner."""
        match = LEGACY_PATH.fullmatch(path) or API_PATH.fullmatch(path) or RESOLVE_PATH.fullmatch(path)
        if match is None:
            return None
        repo_type, asked = match[1] or "model", match[2]
        if (repo_type, asked) in self.repos:
            return None
        names = {name.lower(): name for kind, name in self.repos if kind == repo_type}
        name = self.moved.get((repo_type, asked.lower())) or names.get(asked.lower())
        return None if name is None else path.replace(asked, name, 1)

    def _web(self, repo: Repo) -> str:
        return f"{self.url}/{'' if repo.type == 'model' else repo.type + 's/'}{repo.id}"

    def _resolve(self, repo: Repo, revision: str, path: str, wanted: str | None) -> Answer:
        commit = self._commit_at(repo, revision)
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        headers = {
            "X-Repo-Commit": commit.oid,
            "ETag": f'"{blob.sha256 if blob.lfs else blob.git_oid}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.split('/')[-1])}",
        }
        if blob.lfs:
            headers |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"'}
        bounds = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
        if bounds is None or bounds[0] == "bytes=-":
            return Answer(200, headers, blob.path, 0, blob.size)
        start = int(bounds[1]) if bounds[1] else max(0, blob.size - int(bounds[2]))
        end = min(int(bounds[2]), blob.size - 1) if bounds[1] and bounds[2] else blob.size - 1
        if start > end:
            raise HubError(416, "Range not satisfiable", Content_Range=f"bytes */{blob.size}")
        headers["Content-Range"] = f"bytes {start}-{end}/{blob.size}"
        return Answer(206, headers, blob.path, start, end - start + 1)

    def _whoami(self, user: User | None) -> Answer:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        token: dict[str, Any] = {"displayName": "test token", "role": user.role, "createdAt": _now()}
        if user.role == "fineGrained":
            kinds = {True: "model", False: "org"}
            scoped = [
                {
                    "entity": {"_id": name, "type": "user" if name == user.name else kinds["/" in name], "name": name},
                    "permissions": permissions,
                }
                for name, permissions in user.scopes.items()
            ]
            token["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": scoped}
        orgs = [
            {"type": "org", "id": name, "name": name, "fullname": name, "roleInOrg": role}
            for name, role in user.orgs.items()
        ]
        auth = {"type": "access_token", "accessToken": token}
        return Answer.json(
            {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth}
        )

    def _validate_yaml(self, content: str) -> Answer:
        try:
            metadata = _front_matter(content)
        except yaml.YAMLError as error:
            return Answer.json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return Answer.json({"errors": [], "warnings": warnings})

    def _create_or_delete(self, user: User | None, method: str, wanted: dict[str, Any]) -> Answer:
        if user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        repo_type = wanted.get("type") or "model"
        repo_id = f"{wanted.get('organization') or user.name}/{wanted['name']}"
        if method == "DELETE":
            self._repo(user, repo_type, repo_id)
        if not self._can_write(user, repo_id):
            namespace = repo_id.split("/")[0]
            raise HubError(403, f'You don\'t have the rights to change a {repo_type} under the namespace "{namespace}"')
        if method == "DELETE":
            del self.repos[repo_type, repo_id]
            return Answer.json({})
        if known := self.repos.get((repo_type, repo_id)):
            message = f"You already created this {repo_type} repo"
            return Answer.json({"error": message, "url": self._web(known)}, 409, {"X-Error-Message": message})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        files = {".gitattributes": attributes.encode()}
        self.add_repo(repo_id, files, repo_type=repo_type, private=private, message="initial commit")
        return Answer.json({"url": self._web(self.repos[repo_type, repo_id]), "name": repo_id, "id": repo_id})

    def _get_revision(self, call: Call) -> Answer:
        commit = self._commit_at(call.repo, call.first or "main")
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
        if "blobs" in call.query:
            for sibling, blob in zip(siblings, commit.files.values(), strict=True):
                sibling |= {"size": blob.size, "blobId": blob.git_oid}
                if blob.lfs:
                    sibling["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
        readme = commit.files.get("README.md")
        info = {
            "id": call.repo.id,
            "author": call.repo.id.split("/")[0],
            "sha": commit.oid,
            "lastModified": commit.date,
            "createdAt": call.repo.date,
            "private": call.repo.private,
            "gated": "auto" if call.repo.gated else False,
            "tags": [],
            "cardData": _front_matter(readme.path.read_text("utf-8", errors="replace")) if readme else None,
            "usedStorage": sum(blob.size for blob in commit.files.values()),
            "siblings": siblings,
        }
        expand = call.query.get("expand", []) + call.query.get("expand[]", [])
        return Answer.json({key: value for key, value in info.items() if not expand or key in ("id", *expand)})

    def _entries(self, repo: Repo, commit: Commit, expand: bool) -> dict[str, dict[str, Any]]:
        """Every file and folder of a commit by path, as the tree and paths-info requests describe them."""
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in commit.files.items():
            parts = path.split("/")
            for folder in ("/".join(parts[:depth]) for depth in range(1, len(parts))):
                oid = _git_oid(f"{commit.oid}/{folder}".encode())
                entries.setdefault(folder, {"type": "directory", "oid": oid, "size": 0, "path": folder})
            entries[path] = {"type": "file", "oid": blob.git_oid, "size": blob.size, "path": path}
            if blob.lfs:
                entries[path]["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
            if expand:
                same = [c for c in self._history(repo, commit) if c.files.get(path) == blob]
                entries[path]["lastCommit"] = {"id": same[-1].oid, "title": same[-1].title, "date": same[-1].date}
        return entries

    def _get_tree(self, call: Call) -> Answer:
        commit = self._commit_at(call.repo, call.first)
        entries = self._entries(call.repo, commit, call.query.get("expand") == ["true"])
        if call.rest and entries.get(call.rest, {}).get("type") != "directory":
            raise HubError(404, f"{call.rest} is no folder of {call.first}", "EntryNotFound", X_Repo_Commit=commit.oid)
        prefix = f"{call.rest}/" if call.rest else ""
        recursive = call.query.get("recursive") == ["true"]
        inside = [path for path in entries if path.startswith(prefix)]
        return Answer.json([entries[path] for path in inside if recursive or "/" not in path[len(prefix) :]])

    def _post_paths_info(self, call: Call) -> Answer:
        form = parse_qs(call.data.decode())
        entries = self._entries(call.repo, self._commit_at(call.repo, call.first), form.get("expand") == ["true"])
        return Answer.json([entries[path] for path in form.get("paths", []) if path in entries])

    def _get_refs(self, call: Call) -> Answer:
        listed: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for ref, oid in call.repo.refs.items():
            kind = "pullRequests" if ref.startswith("refs/pr/") else "branches"
            listed[kind].append({"name": ref.removeprefix("refs/heads/"), "ref": ref, "targetCommit": oid})
        return Answer.json(listed)

    def _get_commits(self, call: Call) -> Answer:
        listed = []
        for c in self._history(call.repo, self._commit_at(call.repo, call.first)):
            authors = [{"user": c.author}]
            listed.append({"id": c.oid, "title": c.title, "message": c.description, "authors": authors, "date": c.date})
        return Answer.json(listed)

    def _get_auth_check(self, call: Call) -> Answer:
        self._repo(call.user, call.repo.type, call.repo.id, content=True)
        if call.first == "write":
            self._writer(call.user, call.repo)
        return Answer.json({})

    def _get_discussions(self, call: Call) -> Answer:
        listed = [
            {
                "num": pull.num,
                "title": pull.title,
                "author": {"name": pull.author},
                "createdAt": pull.date,
                "status": pull.status,
                "isPullRequest": True,
                "repo": {"name": call.repo.id, "type": call.repo.type},
            }
            for pull in call.repo.pulls
        ]
        if call.first:
            found = next((pull for pull in listed if str(pull["num"]) == call.first), None)
            if found is None:
                raise HubError(404, "Discussion not found")
            pull = call.repo.pulls[found["num"] - 1]
            opening = {
                "id": "1",
                "type": "comment",
                "createdAt": pull.date,
                "author": {"name": pull.author},
                "data": {"edited": False, "hidden": False, "latest": {"raw": pull.description, "html": ""}},
            }
            changes = {"base": pull.base}
            return Answer.json({**found, "changes": changes, "filesWithConflicts": [], "events": [opening]})
        if call.query.get("type") == ["discussion"]:
            listed = []
        if status := call.query.get("status"):
            listed = [pull for pull in listed if (pull["status"] == "open") == (status == ["open"])]
        if authors := call.query.get("author"):
            listed = [pull for pull in listed if pull["author"]["name"] in authors]
        return Answer.json({"discussions": listed, "count": len(listed), "start": 0})

    def _post_preupload(self, call: Call) -> Answer:
        self._writer(call.user, call.repo, as_pull_request="create_pr" in call.query)
        commit = self._commit_at(call.repo, call.first)
        files = []
        for asked in json.loads(call.data)["files"]:
            path = asked["path"]
            known = commit.files.get(path)
            mode = {"uploadMode": "lfs" if _is_lfs(path, asked["size"]) else "regular", "shouldIgnore": False}
            oid = {"oid": known.sha256 if known.lfs else known.git_oid} if known else {}
            files.append({"path": path, **mode, **oid})
        return Answer.json({"files": files, "commitOid": commit.oid})

    def _lfs(self, repo: Repo, user: User | None, action: str, asked: dict[str, Any]) -> Answer:
        self._writer(user, repo, as_pull_request=True)
        base = f"{self._web(repo)}.git/info/lfs"
        if action == "verify":
            stored = self._root / asked["oid"]
            if asked["oid"] not in repo.uploaded or stored.stat().st_size != asked["size"]:
                raise HubError(404, "LFS object not found")
            return Answer.json({})
        objects = []
        for item in asked["objects"]:
            actions = {
                "upload": {"href": f"{base}/objects/{item['oid']}{self.signature}"},
                "verify": {"href": f"{base}/verify"},
            }
            objects.append(item if item["oid"] in repo.uploaded else {**item, "actions": actions})
        return Answer.json({"transfer": "basic", "objects": objects})

    def _receive_lfs(self, repo: Repo, oid: str, body: Iterator[bytes]) -> Answer:
        """Take an upload; like a signed storage address it asks for no token."""
        if self._store(body).name != oid:
            raise HubError(400, "The content does not have the announced sha256")
        with self.lock:
            repo.uploaded.add(oid)
        return Answer()

    def _post_commit(self, call: Call) -> Answer:
        create_pr = "create_pr" in call.query
        author = self._writer(call.user, call.repo, as_pull_request=create_pr).name
        lines = [json.loads(line) for line in call.data.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = self._commit_at(call.repo, call.first)
        base = header.get("parentCommit")
        if create_pr and base:
            head = self._commit_at(call.repo, base)
        elif base and base != head.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head.files)
        for line in lines:
            self._apply(call.repo, tree, line["key"], line["value"])
        ref = self._ref(call.repo, call.first)
        if create_pr:
            text = header.get("description", "")
            pull = self._new_pull_request(call.repo, header["summary"], author, ref or call.first, text)
            ref = pull.revision
        if ref is None:
            raise HubError(404, f"Invalid rev id: {call.first}", "RevisionNotFound")
        commit = self._record(call.repo, ref, head.oid, tree, header["summary"], header.get("description", ""), author)
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{self._web(call.repo)}/commit/{commit.oid}"}
        return Answer.json({**answer, "hookOutput": "", **({"pullRequestUrl": pull.url} if create_pr else {})})

    def _new_pull_request(self, repo: Repo, title: str, author: str, base: str, description: str) -> PullRequest:
        num = len(repo.pulls) + 1
        url = f"{self._web(repo)}/discussions/{num}"
        pull = PullRequest(num, title, author, f"refs/pr/{num}", base, url, _now(), description=description)
        repo.pulls.append(pull)
        return pull

    def _apply(self, repo: Repo, tree: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value.get("path", "")
        if key == "file":
            tree[path] = self._blob(repo, path, self._store(base64.b64decode(value["content"])), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in repo.uploaded:
                raise HubError(400, f"LFS pointer of {path} points to a file that does not exist")
            tree[path] = self._blob(repo, path, self._root / value["oid"], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [p for p in tree if p == path or (key == "deletedFolder" and p.startswith(folder))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del tree[name]


class _Server(ThreadingHTTPServer):
    hub: StandInHub
    request_queue_size = 128  # the client opens many connections at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that breaks a connection is nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are separate writes: without this each answer waits 40 ms

    def _body(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left and (chunk := self.rfile.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk

    def _serve(self) -> None:
        hub = self.server.hub
        if hub.closed:  # a kept-alive connection must not outlive the hub
            self.close_connection = True
            return
        fault = hub.take_fault(self.command, self.path) or Fault()
        time.sleep(fault.delay)
        if fault.reset:
            self._log(hub, 0)
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        body = self._body()
        if fault.status is not None and not fault.drop_answer:
            answer = Answer(fault.status, {}, fault.body, 0, len(fault.body))
        else:
            try:
                answer = hub.dispatch(self.command, self.path, self.headers, body)
            except HubError as error:
                answer = error.answer
            except Exception:
                answer = Answer.json({"error": traceback.format_exc()}, 500)
        for _ in body:  # what is left unread would be taken for the next request
            pass
        self._log(hub, answer.status)
        if fault.drop_answer:
            self.close_connection = True
            return
        answer.headers.update(fault.headers)
        try:
            self._send(answer, fault)
        except ConnectionError:
            self.close_connection = True

    def _log(self, hub: StandInHub, status: int) -> None:
        kept = {name: self.headers[name] for name in LOGGED_HEADERS if name in self.headers}
        with hub.lock:
            hub.requests.append(Request(self.command, self.path, status, "Authorization" in self.headers, kept))

    def _send(self, answer: Answer, fault: Fault) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(answer.length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = answer.length if fault.cut_after is None else min(fault.cut_after, answer.length)
        sent, flipped = 0, answer.length // 2
        for chunk in answer.chunks():
            if fault.corrupt and sent <= flipped < sent + len(chunk):
                changed = bytearray(chunk)
                changed[flipped - sent] ^= 0xFF
                chunk = bytes(changed)
            self.wfile.write(chunk[: limit - sent])
            sent += len(chunk)
            if sent >= limit:
                break
        if limit < answer.length:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Keep test output clean; the hub has its own log."""
