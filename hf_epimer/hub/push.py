"""Pushing a merged folder to the Hub: one commit, or one pull request, whatever is lost on the way."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import huggingface_hub

from hf_epimer.errors import EpimerError, PushError
from hf_epimer.hub.retry import persist
from hf_epimer.hub.rights import existing_repo
from hf_epimer.hub.words import one_line

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import ModelInfo

Content = Path | bytes


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
        info = existing_repo(repo_id, repo_id)
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


def _open_pull_request(
    api: HfApi, repo_id: str, contents: Mapping[str, Content], title: str, outdated: Collection[str]
) -> str:
    """The address of the open pull request with these contents: that of an earlier, interrupted push, or a new one,
    whose description says by what it is known again."""
    author = persist(lambda: api.whoami()["name"], repo_id, "whose token this is")
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
    contents: Mapping[str, Content], info: ModelInfo, outdated: Collection[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """All files to add; and of those that the repo has, the ones to delete that would speak of other weights."""
    present = [entry.rfilename for entry in info.siblings or []]
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
    return is_weights or name in _OURS or name.startswith("heads/")  # classifiers that read what the weights give


_OURS = (
    "adapter_config.json",  # beside full weights it would make transformers load them as an adapter's base
    "adapter_model.safetensors",
    "config.json",  # of full weights, now replaced by an adapter
    "results.json",
    "accuracy.png",
    ".eval_results/hf-epimer.yaml",
)
