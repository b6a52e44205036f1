"""Every request of a merge and of a push fails in every way: the right result, or one clean error and nothing wrong.

A clean run tells the requests; then each of them is hit, on a fresh Hub and an empty cache. Whatever came of it, the
command repeated on a Hub that is well again ends in one commit, or one pull request, with all files whole.

About 1,400 cases; each run takes every eighth of them, each kind of fault from another request on, and
FAULT_CAMPAIGN_EVERY=1 takes them all.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from helpers.checkpoints import tiny_state, write_checkpoint
from helpers.command import Run
from helpers.hub_cases import TOKENS, pickle_weights
from helpers.hub_server import WRITER, Fault, StandInHub

pytestmark = pytest.mark.slow

ONCE: dict[str, dict[str, Any]] = {
    "429": {"status": 429, "headers": {"Retry-After": "0"}},
    "500": {"status": 500},
    "reset": {"reset": True},
    "cut": {"cut_after": 40},
    "flipped": {"corrupt": True},
    "lost answer": {"drop_answer": True},
    "login page": {"status": 200, "body": b"<html>sign in</html>", "headers": {"Content-Type": "text/html"}},
}
LASTING: dict[str, dict[str, Any]] = {
    "429 for ever": ONCE["429"],
    "500 for ever": ONCE["500"],
    "403 for ever": {"status": 403},
    "404 for ever": {"status": 404},
    "reset for ever": ONCE["reset"],
    "lost answers for ever": ONCE["lost answer"],
}

MERGE = ("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--method", "mean", "--out", "merged")
EVERY = int(os.environ.get("FAULT_CAMPAIGN_EVERY", "8"))

SCENARIOS: dict[str, tuple[str, ...]] = {
    "a merge": MERGE,
    "a merge pushed to a new repo": (*MERGE, "--push-to", "org/new"),
    "a merge pushed over an older one": (*MERGE, "--push-to", "org/old"),
    "a merge as a pull request": (*MERGE, "--push-to", "org/old", "--create-pr"),
}


@pytest.mark.parametrize("kind", [*ONCE, *LASTING])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_request_fails(
    scenario: str, kind: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    words = SCENARIOS[scenario]
    with _place(tmp_path, monkeypatch) as hub:
        assert run(*words)[0] == 0
        right = Outcome.of(hub, words)
        requests = [(r.method, r.path) for r in hub.requests]
    assert right.is_whole(words)
    wrong = []
    first = [*ONCE, *LASTING].index(kind) % EVERY
    for number, (method, path) in list(enumerate(requests))[first::EVERY]:
        with _place(tmp_path, monkeypatch) as hub:
            if kind in ONCE:
                hub.inject(Fault(after=number, **ONCE[kind]))
            else:
                exact = rf"^{re.escape(re.sub(r'[0-9a-f]{40,64}', 'HASH', path))}$".replace("HASH", "[0-9a-f]{40,64}")
                hub.inject(Fault(method=method, path=exact, times=None, **LASTING[kind]))
            result = run(*words)
            problems = [*_judge(result, Outcome.of(hub, words), right)]
            if result[0] != 0:
                hub.faults.clear()
                result = run(*_again(words))
                problems += [f"repeated: {p}" for p in _judge(result, Outcome.of(hub, words), right, True)]
            wrong += [f"{kind} at {method} {path}: {problem}" for problem in problems]
    assert not wrong, "\n".join(wrong)


@dataclass(frozen=True)
class Outcome:
    """What a run has left: the weights in the folder, what lies on the Hub, how many merges are there."""

    weights: bytes | None
    leftovers: tuple[str, ...]
    merges: int
    files: frozenset[str]
    pushed_weights: str

    @classmethod
    def of(cls, hub: StandInHub, words: tuple[str, ...]) -> Outcome:
        folder = Path("merged")
        weights = (folder / "model.safetensors").read_bytes() if folder.exists() else None
        leftovers = tuple(path.name for path in Path().iterdir() if path.name.startswith("."))
        repo = words[words.index("--push-to") + 1] if "--push-to" in words else ""
        if not repo or not hub.exists(repo):
            return cls(weights, leftovers, 0, frozenset(), "")
        if "--create-pr" in words:
            heads = [hub.commits(repo, revision=pull.revision)[0] for pull in hub.pull_requests(repo)]
        else:
            heads = [commit for commit in hub.commits(repo) if "Merge 2 checkpoints" in commit.title]
        if not heads:
            return cls(weights, leftovers, 0, frozenset(), "")
        files = heads[0].files
        return cls(weights, leftovers, len(heads), frozenset(files), files["model.safetensors"].sha256)

    def is_whole(self, words: tuple[str, ...]) -> bool:
        return self.weights is not None and self.merges == ("--push-to" in words)


def _judge(result: tuple[int, str, str], found: Outcome, right: Outcome, must_succeed: bool = False) -> Iterator[str]:
    """What is wrong with a run and what it left."""
    code, output, complaint = result
    lines = [line for line in complaint.splitlines() if not line.startswith("warning: ")]
    if found.leftovers:
        yield f"left behind: {found.leftovers}"
    if found.weights not in (None, right.weights):
        yield "another merge than the right one"
    if found.merges > 1 or (
        found.merges and (found.files, found.pushed_weights) != (right.files, right.pushed_weights)
    ):
        yield f"on the Hub: {found.merges} merges, {sorted(found.files ^ right.files)}"
    if code == 0 and (found != right or lines):
        yield f"success, and {lines or 'something is missing'}"
    if code != 0 and (code != 1 or len(lines) != 1 or not lines[0].startswith("error: ") or output):
        yield f"exit code {code}, {lines}"
    if "Traceback" in complaint or "shows where" in complaint or re.search(r"https?://\S+\?", complaint):
        yield f"not for users: {complaint}"
    if any(token in output + complaint for token in TOKENS):
        yield "a token was shown"
    if must_succeed and code != 0:
        yield f"no success: {lines}"


def _again(words: tuple[str, ...]) -> tuple[str, ...]:
    """What a user does next: push the merged folder if there is one, else the same once more."""
    return ("push", "merged", *words[words.index("--push-to") + 1 :]) if Path("merged").exists() else words


_numbers = itertools.count()


@contextlib.contextmanager
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A fresh Hub with a base whose weights a bot converted, an empty cache, an empty working folder."""
    folder = tmp_path / str(next(_numbers))
    folder.mkdir()
    source = tmp_path / "source"
    if not source.exists():
        base = tiny_state(0)
        write_checkpoint(source / "base", base)
        for seed, task in enumerate(("dtd", "svhn"), start=1):
            write_checkpoint(source / task, tiny_state(seed, base), card="---\nbase_model: org/base\n---\n")
    with StandInHub() as hub:
        hub.add_user(WRITER, "ann", orgs=["org"])
        hub.add_repo("org/base", source / "base")
        pickle_weights(hub, "org/base")
        for task in ("dtd", "svhn"):
            hub.add_repo(f"org/vit-b32-{task}", source / task)
        hub.add_repo("org/old", {"fisher.safetensors": b"old", "results.json": b"{}", "notes.txt": b"theirs"})
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        working = folder / "working"
        working.mkdir()
        monkeypatch.chdir(working)
        yield hub
        _wait_for_downloads()
        close_session()
    shutil.rmtree(folder)


def _wait_for_downloads() -> None:
    import threading

    for thread in threading.enumerate():
        if thread.name.startswith("fetch"):
            thread.join(20)
