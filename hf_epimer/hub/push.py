"""Pushing to the Hugging Face Hub: rights are checked before the work, and a push is one commit or one pull request."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import LocalTokenNotFoundError

from hf_epimer.errors import AccessError, EpimerError, HubError, NotFoundError, PushError, UsageError
from hf_epimer.hub.source import one_line, persist


def check_push_access(repo_id: str, *, create_pr: bool = False, private: bool = False) -> None:
    """Find out before any work whether the token may push to `repo_id`.

    Raises:
        UsageError: it is to be private and is public already.
        AccessError: no token, an invalid or read-only one, or a namespace it may not write to.
    """
    where = f"pushing to {repo_id}"
    api = HfApi()
    try:
        user = persist(api.whoami, where)
    except LocalTokenNotFoundError as error:
        raise AccessError(f"{where}: there is no token; run `hf auth login` or set HF_TOKEN") from error
    if constants.is_offline_mode():
        raise HubError(f"{where}: HF_HUB_OFFLINE is set")
    try:
        persist(lambda: api.auth_check(repo_id, write=not create_pr), where)
        exists = True
        if private and not create_pr and not persist(lambda: api.model_info(repo_id), where).private:
            raise UsageError(f"{where}: the repo exists and is public; push without --private, or to another repo")
    except AccessError:
        raise
    except NotFoundError:
        exists = False
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise AccessError(f"{where}: the token of {user['name']} is read-only; create one with write access")
    if create_pr and not exists:
        raise AccessError(f"{where}: a pull request needs a repo that exists")
    if not exists and not _may_create(user, repo_id.split("/")[0]):
        raise AccessError(f"{where}: {user['name']} may not create a repo under {repo_id.split('/')[0]}")


def _may_create(user: dict[str, Any], namespace: str) -> bool:
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "fineGrained":
        scopes = token.get("fineGrained", {}).get("scoped", [])
        return any(
            scope.get("entity", {}).get("name") == namespace and "repo.write" in scope.get("permissions", ())
            for scope in scopes
        )
    if namespace == user.get("name"):
        return True
    return any(
        org.get("name") == namespace and org.get("roleInOrg", "write") in ("admin", "write", "contributor")
        for org in user.get("orgs", ())
    )


def push_folder(folder: Path, repo_id: str, *, private: bool = False, create_pr: bool = False, title: str) -> str:
    """Push a merged folder as one commit, or one pull request; weights, Fisher information and
    results of an older push are deleted in it.

    A lost answer is asked for again: files that already arrived make no second commit.

    Returns:
        The address of the commit or pull request.

    Raises:
        PushError: with the command that tries again.
    """
    api = HfApi()
    flags = ["--private"] * private + ["--create-pr"] * create_pr
    again = shlex.join(["hf-epimer", "push", str(folder), repo_id, *flags])
    retry = f"; the merged folder is complete, push it again with: {again}"
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    try:
        if not create_pr:
            persist(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id)
        present = persist(lambda: api.list_repo_files(repo_id), repo_id)
        names = {path.name for path in paths}
        stale = [name for name in present if _is_ours(name) and name not in names]
        opened_before = _open_pull_requests(api, repo_id, title) if create_pr else {}

        def commit() -> str:
            if create_pr:
                new = _open_pull_requests(api, repo_id, title).items() - opened_before.items()
                if new:
                    return next(iter(new))[1]
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                *(CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in paths),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ]
            result = api.create_commit(repo_id, operations, commit_message=title, create_pr=create_pr)
            return str(result.pr_url or result.commit_url)

        return persist(commit, repo_id)
    except EpimerError as error:
        raise PushError(f"{error}{retry}") from error
    except KeyboardInterrupt as error:
        raise PushError(f"{repo_id}: interrupted{retry}") from error
    except (ValueError, OSError) as error:
        raise PushError(f"{repo_id}: {one_line(error)}{retry}") from error


def push_beside(
    repo_id: str,
    branch: str | None,
    files: dict[str, Path],
    *,
    expected: dict[str, str | None],
    section: str,
    title: str,
) -> str:
    """Add files and a section of the model card to a repo that is there already, in one commit.

    Args:
        branch: None for main.
        files: name in the repo -> file.
        expected: weight file -> the sha256 it must still have, as far as it is known.
        section: Markdown that begins with a heading of the second level; it replaces the section of that name.
        title: of the commit.

    Returns:
        The address of the commit.

    Raises:
        PushError: the weights have changed meanwhile, or the push failed; the files are kept.
    """
    api = HfApi()
    kept = "; what was measured is kept in the cache, run the same command again"

    def commit() -> str:
        info = api.model_info(repo_id, revision=branch, files_metadata=True)
        present = {entry.rfilename: entry.lfs.sha256 if entry.lfs else None for entry in info.siblings or []}
        moved = [name for name, sha256 in expected.items() if sha256 and present.get(name) != sha256]
        if moved:
            raise PushError(f"{repo_id}: {moved[0]} was changed while it was measured{kept}")
        card = ""
        if "README.md" in present:
            card = Path(api.hf_hub_download(repo_id, "README.md", revision=info.sha)).read_text(encoding="utf-8")
        operations = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
            CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=with_section(card, section).encode()),
        ]
        return str(api.create_commit(repo_id, operations, commit_message=title, revision=branch).commit_url)

    try:
        return persist(commit, repo_id)
    except PushError:
        raise
    except EpimerError as error:
        raise PushError(f"{error}{kept}") from error
    except (ValueError, OSError) as error:
        raise PushError(f"{repo_id}: {one_line(error)}{kept}") from error


def with_section(card: str, section: str) -> str:
    """A model card with a section added, or replaced where one has the same heading."""
    heading = section.splitlines()[0]
    lines = card.rstrip().splitlines()
    if heading in lines:
        start = lines.index(heading)
        end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith(("# ", "## "))), len(lines))
        return "\n".join([*lines[:start], section.rstrip(), "", *lines[end:]]).rstrip() + "\n"
    return "\n".join([*lines, "", section.rstrip()]).lstrip("\n") + "\n"


def _is_ours(name: str) -> bool:
    """Files that would speak of other weights than those now pushed."""
    is_weights = name.startswith("model") and ".safetensors" in name
    return is_weights or name in _OURS


_OURS = (
    "adapter_config.json",  # beside full weights it would make transformers load them as an adapter's base
    "adapter_model.safetensors",
    "config.json",  # of full weights, now replaced by an adapter
    "fisher.safetensors",
    "kronecker.safetensors",
    "results.json",
)


def _open_pull_requests(api: HfApi, repo_id: str, title: str) -> dict[int, str]:
    discussions = api.get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open")
    return {entry.num: entry.url for entry in discussions if entry.title == title}
