"""The answers to requests, one function for each part of the Hub's interface."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

import yaml

from helpers.hub.records import Answer, Blob, Call, Commit, HubError, Repo, User, now
from helpers.hub.store import LFS_SUFFIXES, git_oid, is_lfs

if TYPE_CHECKING:
    from helpers.hub_server import StandInHub


def front_matter(text: str) -> Any:
    """The metadata block of a README, None when it has none; raises yaml.YAMLError when it cannot be read."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def whoami(user: User | None) -> Answer:
    if user is None:
        raise HubError(401, "Invalid username or password.")
    token: dict[str, Any] = {"displayName": "test token", "role": user.role, "createdAt": now()}
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


def validate_yaml(content: str) -> Answer:
    try:
        metadata = front_matter(content)
    except yaml.YAMLError as error:
        return Answer.json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return Answer.json({"errors": [], "warnings": warnings})


def create_or_delete(hub: StandInHub, user: User | None, method: str, wanted: dict[str, Any]) -> Answer:
    if user is None:
        raise HubError(401, "Invalid username or password.", "RepoNotFound")
    repo_type = wanted.get("type") or "model"
    repo_id = f"{wanted.get('organization') or user.name}/{wanted['name']}"
    if method == "DELETE":
        hub.rights.repo(user, repo_type, repo_id)
    if not hub.rights.can_write(user, repo_id):
        namespace = repo_id.split("/")[0]
        raise HubError(403, f'You don\'t have the rights to change a {repo_type} under the namespace "{namespace}"')
    if method == "DELETE":
        del hub.repos[repo_type, repo_id]
        return Answer.json({})
    if known := hub.repos.get((repo_type, repo_id)):
        message = f"You already created this {repo_type} repo"
        return Answer.json({"error": message, "url": hub.address(known)}, 409, {"X-Error-Message": message})
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
    files = {".gitattributes": attributes.encode()}
    hub.add_repo(repo_id, files, repo_type=repo_type, private=private, message="initial commit")
    return Answer.json({"url": hub.address(hub.repos[repo_type, repo_id]), "name": repo_id, "id": repo_id})


def resolve(hub: StandInHub, repo: Repo, revision: str, path: str, wanted: str | None) -> Answer:
    commit = repo.commit_at(revision)
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


def get_revision(hub: StandInHub, call: Call) -> Answer:
    commit = call.repo.commit_at(call.first or "main")
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
        "cardData": front_matter(readme.path.read_text("utf-8", errors="replace")) if readme else None,
        "usedStorage": sum(blob.size for blob in commit.files.values()),
        "siblings": siblings,
    }
    expand = call.query.get("expand", []) + call.query.get("expand[]", [])
    return Answer.json({key: value for key, value in info.items() if not expand or key in ("id", *expand)})


def entries_of(repo: Repo, commit: Commit, expand: bool) -> dict[str, dict[str, Any]]:
    """Every file and folder of a commit by path, as the tree and paths-info requests describe them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in commit.files.items():
        parts = path.split("/")
        for folder in ("/".join(parts[:depth]) for depth in range(1, len(parts))):
            oid = git_oid(f"{commit.oid}/{folder}".encode())
            entries.setdefault(folder, {"type": "directory", "oid": oid, "size": 0, "path": folder})
        entries[path] = {"type": "file", "oid": blob.git_oid, "size": blob.size, "path": path}
        if blob.lfs:
            entries[path]["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
        if expand:
            same = [c for c in repo.history(commit) if c.files.get(path) == blob]
            entries[path]["lastCommit"] = {"id": same[-1].oid, "title": same[-1].title, "date": same[-1].date}
    return entries


def get_tree(hub: StandInHub, call: Call) -> Answer:
    commit = call.repo.commit_at(call.first)
    entries = entries_of(call.repo, commit, call.query.get("expand") == ["true"])
    if call.rest and entries.get(call.rest, {}).get("type") != "directory":
        raise HubError(404, f"{call.rest} is no folder of {call.first}", "EntryNotFound", X_Repo_Commit=commit.oid)
    prefix = f"{call.rest}/" if call.rest else ""
    recursive = call.query.get("recursive") == ["true"]
    inside = [path for path in entries if path.startswith(prefix)]
    return Answer.json([entries[path] for path in inside if recursive or "/" not in path[len(prefix) :]])


def post_paths_info(hub: StandInHub, call: Call) -> Answer:
    form = parse_qs(call.data.decode())
    entries = entries_of(call.repo, call.repo.commit_at(call.first), form.get("expand") == ["true"])
    return Answer.json([entries[path] for path in form.get("paths", []) if path in entries])


def get_refs(hub: StandInHub, call: Call) -> Answer:
    listed: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    for ref, oid in call.repo.refs.items():
        kind = "pullRequests" if ref.startswith("refs/pr/") else "branches"
        listed[kind].append({"name": ref.removeprefix("refs/heads/"), "ref": ref, "targetCommit": oid})
    return Answer.json(listed)


def get_commits(hub: StandInHub, call: Call) -> Answer:
    listed = []
    for c in call.repo.history(call.repo.commit_at(call.first)):
        authors = [{"user": c.author}]
        listed.append({"id": c.oid, "title": c.title, "message": c.description, "authors": authors, "date": c.date})
    return Answer.json(listed)


def get_auth_check(hub: StandInHub, call: Call) -> Answer:
    hub.rights.repo(call.user, call.repo.type, call.repo.id, content=True)
    if call.first == "write":
        hub.rights.writer(call.user, call.repo)
    return Answer.json({})


def get_discussions(hub: StandInHub, call: Call) -> Answer:
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


def post_preupload(hub: StandInHub, call: Call) -> Answer:
    hub.rights.writer(call.user, call.repo, as_pull_request="create_pr" in call.query)
    commit = call.repo.commit_at(call.first)
    files = []
    for asked in json.loads(call.data)["files"]:
        path = asked["path"]
        known = commit.files.get(path)
        mode = {"uploadMode": "lfs" if is_lfs(path, asked["size"]) else "regular", "shouldIgnore": False}
        oid = {"oid": known.sha256 if known.lfs else known.git_oid} if known else {}
        files.append({"path": path, **mode, **oid})
    return Answer.json({"files": files, "commitOid": commit.oid})


def lfs(hub: StandInHub, repo: Repo, user: User | None, action: str, asked: dict[str, Any]) -> Answer:
    hub.rights.writer(user, repo, as_pull_request=True)
    base = f"{hub.address(repo)}.git/info/lfs"
    if action == "verify":
        stored = hub.store.root / asked["oid"]
        if asked["oid"] not in repo.uploaded or stored.stat().st_size != asked["size"]:
            raise HubError(404, "LFS object not found")
        return Answer.json({})
    objects = []
    for item in asked["objects"]:
        actions = {
            "upload": {"href": f"{base}/objects/{item['oid']}{hub.signature}"},
            "verify": {"href": f"{base}/verify"},
        }
        objects.append(item if item["oid"] in repo.uploaded else {**item, "actions": actions})
    return Answer.json({"transfer": "basic", "objects": objects})


def receive_lfs(hub: StandInHub, repo: Repo, oid: str, body: Iterator[bytes]) -> Answer:
    """Take an upload; like a signed storage address it asks for no token."""
    if hub.store.keep(body).name != oid:
        raise HubError(400, "The content does not have the announced sha256")
    with hub.lock:
        repo.uploaded.add(oid)
    return Answer()


def post_commit(hub: StandInHub, call: Call) -> Answer:
    create_pr = "create_pr" in call.query
    author = hub.rights.writer(call.user, call.repo, as_pull_request=create_pr).name
    lines = [json.loads(line) for line in call.data.splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    head = call.repo.commit_at(call.first)
    base = header.get("parentCommit")
    if create_pr and base:
        head = call.repo.commit_at(base)
    elif base and base != head.oid:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    tree = dict(head.files)
    for line in lines:
        apply(hub, call.repo, tree, line["key"], line["value"])
    ref = call.repo.ref(call.first)
    if create_pr:
        text = header.get("description", "")
        pull = hub.new_pull_request(call.repo, header["summary"], author, ref or call.first, text)
        ref = pull.revision
    if ref is None:
        raise HubError(404, f"Invalid rev id: {call.first}", "RevisionNotFound")
    commit = call.repo.record(ref, head.oid, tree, header["summary"], header.get("description", ""), author)
    answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{hub.address(call.repo)}/commit/{commit.oid}"}
    return Answer.json({**answer, "hookOutput": "", **({"pullRequestUrl": pull.url} if create_pr else {})})


def apply(hub: StandInHub, repo: Repo, tree: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    path = value.get("path", "")
    if key == "file":
        tree[path] = hub.store.blob(repo, path, hub.store.keep(base64.b64decode(value["content"])), lfs=False)
    elif key == "lfsFile":
        if value["oid"] not in repo.uploaded:
            raise HubError(400, f"LFS pointer of {path} points to a file that does not exist")
        tree[path] = hub.store.blob(repo, path, hub.store.root / value["oid"], lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        folder = path.rstrip("/") + "/"
        gone = [p for p in tree if p == path or (key == "deletedFolder" and p.startswith(folder))]
        if not gone:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del tree[name]


ABOUT_A_REPO: dict[tuple[str, str], Callable[[StandInHub, Call], Answer]] = {
    ("GET", "revision"): get_revision,
    ("GET", "tree"): get_tree,
    ("GET", "refs"): get_refs,
    ("GET", "commits"): get_commits,
    ("GET", "auth-check"): get_auth_check,
    ("GET", "discussions"): get_discussions,
    ("POST", "paths-info"): post_paths_info,
    ("POST", "preupload"): post_preupload,
    ("POST", "commit"): post_commit,
}
"""By method and what stands behind the repo's id; a repo's id alone means its main revision."""
