"""A local stand-in for the Hugging Face Hub, for tests that drive the real ``huggingface_hub`` client.

It speaks the part of the Hub's HTTP interface that the client uses to read and write repositories (without Xet:
set ``HF_HUB_DISABLE_XET=1``), keeps repositories in a temporary folder, and can be told to misbehave (``Fault``).

Known differences from the real Hub: a large file is served directly instead of through a redirect to a CDN; lists
are not paginated; a refused anonymous request always carries ``X-Error-Code`` because the client guesses
"repository not found" from a bare 401 only for https addresses.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, unquote

from helpers.hub.api import (
    ABOUT_A_REPO,
    create_or_delete,
    lfs,
    receive_lfs,
    resolve,
    validate_yaml,
    whoami,
)
from helpers.hub.records import Answer, Call, Commit, Fault, HubError, PullRequest, Repo, Request, User, now
from helpers.hub.rights import Rights
from helpers.hub.store import Store
from helpers.hub.transport import Handler, Server

__all__ = ["READER", "STRANGER", "WRITER", "Fault", "PullRequest", "StandInHub"]

WRITER, READER, STRANGER = "hf_writer_secret", "hf_reader_secret", "hf_stranger_secret"
Files = Mapping[str, "bytes | Path | None"]

API_PATH = re.compile(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/([^/]+))?(?:/([^/]+))?(?:/(.+))?")
LEGACY_PATH = re.compile(r"/api/(dataset)s/([^/]+)(?:/revision/.+)?")
RESOLVE_PATH = re.compile(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/(?:resolve|raw)/([^/]+)/(.+)")
LFS_PATH = re.compile(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)\.git/info/lfs/(.+)")


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
        self.store = Store(Path(tempfile.mkdtemp(prefix="stand-in-hub-")))
        self.rights = Rights(self.users, self.repos)
        self._server = Server(("127.0.0.1", 0), Handler)
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
        shutil.rmtree(self.store.root, ignore_errors=True)

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
            self.repos[repo_type, repo_id] = Repo(repo_id, repo_type, private, gated, set(granted), now())
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
            ref = repo.ref(revision) or f"refs/heads/{revision}"
            parent = repo.refs.get(ref)
            tree = dict(repo.commits[parent].files) if parent else {}
            for path, content in files.items():
                if content is None:
                    del tree[path]
                else:
                    tree[path] = self.store.blob(repo, path, self.store.keep(content))
            return repo.record(ref, parent, tree, message, "", author).oid

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
            head = repo.commit_at(base)
            pull = self.new_pull_request(repo, title, author, f"refs/heads/{base}", description)
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
            return repo.history(repo.commit_at(revision))

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

    # Requests

    def dispatch(self, method: str, target: str, headers: Mapping[str, str], body: Iterator[bytes]) -> Answer:
        path, _, query_text = target.partition("?")
        query = parse_qs(query_text)
        if method == "PUT" and (match := LFS_PATH.fullmatch(path)):
            return receive_lfs(self, self.repos[match[1] or "model", match[2]], match[3].split("/")[-1], body)
        data = b"".join(body)
        with self.lock:
            user = self.rights.user(headers)
            if elsewhere := self._redirection(path):
                target = f"{elsewhere}?{query_text}" if query_text else elsewhere
                return Answer(307, {"Location": target})
            if match := API_PATH.fullmatch(path):
                repo_type, repo_id, action, first, rest = match.groups()
                handler = ABOUT_A_REPO.get((method, action or "revision"))
                if handler is not None:
                    repo = self.rights.repo(user, repo_type, repo_id)
                    return handler(self, Call(repo, user, unquote(first or ""), unquote(rest or ""), query, data))
            elif match := LFS_PATH.fullmatch(path):
                return lfs(self, self.rights.repo(user, match[1], match[2]), user, match[3], json.loads(data))
            elif method in ("GET", "HEAD") and (match := RESOLVE_PATH.fullmatch(path)):
                repo = self.rights.repo(user, match[1], match[2], content=True)
                return resolve(self, repo, unquote(match[3]), unquote(match[4]), headers.get("Range"))
            elif (method, path) == ("GET", "/api/whoami-v2"):
                return whoami(user)
            elif (method, path) == ("POST", "/api/validate-yaml"):
                return validate_yaml(json.loads(data)["content"])
            elif (method, path) in (("POST", "/api/repos/create"), ("DELETE", "/api/repos/delete")):
                return create_or_delete(self, user, method, json.loads(data))
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

    def address(self, repo: Repo) -> str:
        return f"{self.url}/{'' if repo.type == 'model' else repo.type + 's/'}{repo.id}"

    def new_pull_request(self, repo: Repo, title: str, author: str, base: str, description: str) -> PullRequest:
        num = len(repo.pulls) + 1
        url = f"{self.address(repo)}/discussions/{num}"
        pull = PullRequest(num, title, author, f"refs/pr/{num}", base, url, now(), description=description)
        repo.pulls.append(pull)
        return pull
