"""Who may see, read and write which repository, and how the Hub refuses the others."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote

from helpers.hub.records import HubError, Repo, User


class Rights:
    """Of users by their token over repositories by their type and id."""

    def __init__(self, users: dict[str, User], repos: dict[tuple[str, str], Repo]) -> None:
        self.users = users
        self.repos = repos

    def user(self, headers: Mapping[str, str]) -> User | None:
        given = headers.get("Authorization")
        if given is None:
            return None
        user = self.users.get(given.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def allowed(self, user: User, repo_id: str, permission: str, roles: tuple[str, ...]) -> bool:
        namespace = repo_id.split("/")[0]
        member = namespace == user.name or user.orgs.get(namespace) in roles
        scoped = any(permission in user.scopes.get(entity, ()) for entity in (namespace, repo_id))
        return member and (user.role != "fineGrained" or scoped)

    def can_write(self, user: User, repo_id: str) -> bool:
        return user.role != "read" and self.allowed(user, repo_id, "repo.write", ("write", "admin"))

    def can_see(self, user: User, repo_id: str) -> bool:
        member = self.allowed(user, repo_id, "repo.content.read", ("read", "contributor", "write", "admin"))
        return member or self.can_write(user, repo_id)

    def repo(self, user: User | None, repo_type: str | None, repo_id: str, *, content: bool = False) -> Repo:
        """The repo if this user may know of it, and with ``content`` if the gate is open to them."""
        repo = self.repos.get((repo_type or "model", unquote(repo_id)))
        if repo is None or (repo.private and not (user and self.can_see(user, repo.id))):
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        inside = user is not None and (user.name in repo.granted or self.can_see(user, repo.id))
        if content and repo.gated and not inside:
            message = f"Access to {repo.type} {repo.id} is restricted and you are not in the authorized list."
            raise HubError(403 if user else 401, message, "GatedRepo")
        return repo

    def writer(self, user: User | None, repo: Repo, *, as_pull_request: bool = False) -> User:
        if user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if user.role == "read":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if not as_pull_request and not self.can_write(user, repo.id):
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return user
