"""Pushing to the Hugging Face Hub: rights are checked before the work, and a push is one commit or one pull request."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, TypeAlias

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from hf_epimer.errors import AccessError, EpimerError, HubError, NotFoundError, PushError, UsageError
from hf_epimer.hub.refs import ModelRef, check_new_repo_id
from hf_epimer.hub.retry import persist
from hf_epimer.hub.source import CARD, source_at
from hf_epimer.hub.words import one_line

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import ModelInfo

Content = Path | bytes
CommitOperation: TypeAlias = "CommitOperationAdd | CommitOperationDelete"


def check_push_access(repo_id: str, *, create_pr: bool = False, private: bool = False) -> str:
    """Find out before any work whether the token may push to `repo_id`.

    Returns:
        What the Hub itself calls that repo, where it is there already; `repo_id` otherwise.

    Raises:
        UsageError: no repo can have that name, or it is to be private and is public already.
        AccessError: no token, an invalid or read-only one, or a namespace it may not write to.
    """
    check_new_repo_id(repo_id)
    where = f"pushing to {repo_id}"
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{where}: HF_HUB_OFFLINE is set")
    api = huggingface_hub.HfApi()
    try:
        user = persist(api.whoami, where, "whose token this is")
    except LocalTokenNotFoundError as error:
        raise AccessError(f"{where}: there is no token; run `hf auth login` or set HF_TOKEN") from error
    info = _existing(api, repo_id, where)
    if info:
        persist(lambda: _check_rights(info.id, write=not create_pr), where, "write access")
        if private and not create_pr and not info.private:
            raise UsageError(f"{where}: the repo exists and is public; push without --private, or to another repo")
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise AccessError(f"{where}: the token of {user['name']} is read-only; create one with write access")
    if create_pr and not info:
        raise AccessError(f"{where}: a pull request needs a repo that exists")
    if not info and not _may_create(user, repo_id.split("/")[0]):
        raise AccessError(f"{where}: {user['name']} may not create a repo under {repo_id.split('/')[0]}")
    return info.id if info else repo_id


def check_not_an_input(repo_id: str, inputs: Iterable[str]) -> None:
    """Refuse to push over what the merge is made of.

    Args:
        repo_id: as `check_push_access` returns it.
        inputs: the repos of the checkpoints and of their base, as the Hub calls them; its names ignore case.

    Raises:
        UsageError: it is one of them.
    """
    if repo_id.lower() in {name.lower() for name in inputs}:
        raise UsageError(f"--push-to {repo_id} is one of the checkpoints to merge, or their base: push to another repo")


def push_folder(
    folder: Path,
    files: Iterable[str],
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    title: str,
    outdated: Collection[str] = (),
) -> str:
    """Push files of a merged folder as one commit, or one pull request; weights and results of an older push are
    deleted in it. Recipes are published without the paths of this machine.

    A lost answer is asked for again, and a push may be repeated: what has arrived already makes no second commit and no
    second pull request.

    Args:
        files: the names of those to push; nothing else in the folder is looked at.
        outdated: names of more files of an older push that speak of its weights.

    Returns:
        The address of the commit or pull request.

    Raises:
        PushError: with the command that tries again.
    """
    api = huggingface_hub.HfApi()
    flags = ["--private"] * private + ["--create-pr"] * create_pr
    again = shlex.join(["hf-epimer", "push", str(folder), repo_id, *flags])
    retry = f"; the merged folder is complete, push it again with: {again}"
    try:
        contents = {name: published(folder / name) for name in sorted(files)}
        info = _existing(api, repo_id, repo_id)
        if create_pr:
            return _open_pull_request(api, info.id if info else repo_id, contents, title, outdated)
        if info is None:
            persist(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id, "a new repo")

        def commit() -> str:
            info = api.model_info(repo_id)
            operations = _operations(contents, info, outdated)
            # a commit whose answer was lost may still be under way: then the branch moves, and this one is refused
            return str(api.create_commit(info.id, operations, commit_message=title, parent_commit=info.sha).commit_url)

        return persist(commit, repo_id, "the commit")
    except EpimerError as error:
        raise PushError(f"{error}{retry}") from error
    except KeyboardInterrupt as error:
        raise PushError(f"{repo_id}: interrupted{retry}") from error
    except (OSError, ValueError) as error:
        raise PushError(f"{repo_id}: {one_line(error)}{retry}") from error


def push_beside(
    repo_id: str,
    branch: str | None,
    files: dict[str, Path],
    *,
    expected: dict[str, str | None],
    sections: Sequence[str],
    title: str,
) -> str:
    """Add files and sections of the model card to a repo that is there already, in one commit.

    Args:
        branch: None for main.
        files: name in the repo -> file.
        expected: weight file -> the sha256 it must still have, as far as it is known.
        sections: Markdown that begins with a heading of the second level each; one replaces the section of that name.
        title: of the commit.

    Returns:
        The address of the commit.

    Raises:
        PushError: the weights have changed meanwhile, or the push failed; the files are kept.
    """
    api = huggingface_hub.HfApi()
    kept = "; what was measured is kept in the cache, run the same command again"

    def commit() -> str:
        present = source_at(ModelRef(repo_id), api.model_info(repo_id, revision=branch, files_metadata=True))
        moved = [name for name, sha256 in expected.items() if sha256 and present.sha256.get(name) != sha256]
        if moved:
            raise PushError(f"{repo_id}: {moved[0]} was changed while it was measured{kept}")
        card = present.read_text(CARD) if CARD in present.files else ""
        for section in sections:
            card = with_section(card, section)
        added: dict[str, Content] = {**files, CARD: card.encode()}
        return str(
            api.create_commit(
                repo_id, _operations(added), commit_message=title, revision=branch, parent_commit=present.ref.revision
            ).commit_url
        )

    try:
        return persist(commit, repo_id, "the commit")
    except PushError:
        raise
    except EpimerError as error:
        raise PushError(f"{error}{kept}") from error
    except OSError as error:
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


def published(file: Path) -> Content:
    """What is pushed of a file: of a recipe and an adapter's config a copy in which the folders of this machine have
    their last names only, of any other the file itself."""
    if file.name not in ("merge_config.json", "adapter_config.json"):
        return file
    text = file.read_text(encoding="utf-8")
    local = json.loads(text)
    public = _without_paths(local)
    return file if public == local else (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode()


def _without_paths(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_paths(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_paths(value) for value in content]
    if not isinstance(content, str):
        return content
    label, equals, rest = content.partition("=") if not _is_path(content) else ("", "", content)
    return f"{label}{equals}{PureWindowsPath(rest).name}" if _is_path(rest) else content


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~", "./", "../")) or PureWindowsPath(text).is_absolute()


def _existing(api: HfApi, repo_id: str, where: str) -> ModelInfo | None:
    try:
        return persist(lambda: api.model_info(repo_id), where, "whether the repo exists")
    except NotFoundError:
        return None


def _check_rights(repo_id: str, *, write: bool) -> None:
    """As `HfApi.auth_check(repo_id, write=...)`, which older releases do not have."""
    path = f"{constants.ENDPOINT}/api/models/{repo_id}/auth-check{'/write' if write else ''}"
    hf_raise_for_status(get_session().get(path, headers=build_hf_headers()))


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


def _open_pull_request(
    api: HfApi, repo_id: str, contents: Mapping[str, Content], title: str, outdated: Collection[str]
) -> str:
    """The address of the open pull request with these contents: that of an earlier, interrupted push, or a new one,
    whose description says by what it is known again."""
    author = persist(api.whoami, repo_id, "whose token this is")["name"]
    marker = f"hf-epimer push {_digest(contents)}"

    def request() -> str:
        if earlier := _earlier_pull_request(api, repo_id, author, title, marker):
            return earlier
        operations = _operations(contents, api.model_info(repo_id), outdated)
        result = api.create_commit(repo_id, operations, commit_message=title, commit_description=marker, create_pr=True)
        return str(result.pr_url or result.commit_url)

    return persist(request, repo_id, "the pull request")


def _earlier_pull_request(api: HfApi, repo_id: str, author: str, title: str, marker: str) -> str | None:
    pulls = api.get_repo_discussions(repo_id, author=author, discussion_type="pull_request", discussion_status="open")
    for pull in pulls:
        if (pull.author, pull.title) == (author, title) and pull.git_reference:
            commits = api.list_repo_commits(repo_id, revision=pull.git_reference)
            if any(marker in commit.message for commit in commits):
                return str(pull.url)
    return None


def _digest(contents: Mapping[str, Content]) -> str:
    found = hashlib.sha256()
    for name, content in sorted(contents.items()):
        if isinstance(content, bytes):
            digest = hashlib.sha256(content)
        else:
            with open(content, "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
        found.update(f"{name} {digest.hexdigest()}\n".encode())
    return found.hexdigest()[:32]


def _operations(
    contents: Mapping[str, Content], info: ModelInfo | None = None, outdated: Collection[str] = ()
) -> list[CommitOperation]:
    """All files to add; and of those that the repo has, the ones to delete that would speak of other weights."""
    present = [entry.rfilename for entry in (info.siblings if info else None) or []]
    stale = [name for name in present if name not in contents and (_is_ours(name) or name in outdated)]
    return [
        *(
            huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
            for name, content in contents.items()
        ),
        *(huggingface_hub.CommitOperationDelete(name) for name in stale),
    ]


def _is_ours(name: str) -> bool:
    """Files that would speak of other weights than those now pushed."""
    is_weights = name.startswith("model") and ".safetensors" in name
    return is_weights or name in _OURS


_OURS = (
    "adapter_config.json",  # beside full weights it would make transformers load them as an adapter's base
    "adapter_model.safetensors",
    "config.json",  # of full weights, now replaced by an adapter
    "results.json",
)
