"""Who may push where, found out before any work.

Nothing is pushed over what a merge is made of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from hf_epimer.errors import AccessError, HubError, NotFoundError, UsageError
from hf_epimer.hub.refs import check_new_repo_id
from hf_epimer.hub.retry import persist

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo


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
    try:
        user = persist(_whoami, where, "whose token this is")
    except LocalTokenNotFoundError as error:
        raise AccessError(f"{where}: there is no token; run `hf auth login` or set HF_TOKEN") from error
    info = existing_repo(repo_id, where)
    if info:
        persist(lambda: _check_rights(info.id, write=not create_pr), where, "write access")
        if private and not create_pr and not info.private:
            raise UsageError(f"{where}: the repo exists and is public; push without --private, or to another repo")
    if user["token"].get("role") == "read":
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


def existing_repo(repo_id: str, where: str) -> ModelInfo | None:
    """What the Hub says of a repo; None where there is none, or none that the token in use may see."""
    try:
        return persist(lambda: huggingface_hub.HfApi().model_info(repo_id), where, "whether the repo exists")
    except NotFoundError:
        return None


def _check_rights(repo_id: str, *, write: bool) -> None:
    """As `HfApi.auth_check(repo_id, write=...)`, which older releases do not have."""
    path = f"{constants.ENDPOINT}/api/models/{repo_id}/auth-check{'/write' if write else ''}"
    hf_raise_for_status(get_session().get(path, headers=build_hf_headers()))


def _whoami() -> dict[str, Any]:
    """Whose token is in use, its own description under `token`; a KeyError and its like for an answer of no Hub."""
    user = huggingface_hub.HfApi().whoami()
    return {**user, "name": user["name"], "token": (user.get("auth") or {}).get("accessToken") or {}}


def _may_create(user: dict[str, Any], namespace: str) -> bool:
    token = user["token"]
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
