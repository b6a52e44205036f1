"""What the tests of the Hub ask of a command and of the stand-in's log."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from helpers.hub_server import READER, STRANGER, WRITER, PullRequest, StandInHub

TOKENS = (WRITER, READER, STRANGER)
MISSION = ("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--push-to", "org/merged", "--method", "epimer")


def fails(result: tuple[int, str, str], pattern: str, code: int = 1) -> None:
    """One line of error, and no token or address with its query in anything that was said."""
    found, _, complaint = result
    errors = [line for line in complaint.splitlines() if not line.startswith("warning: ")]
    assert found == code, complaint
    assert len(errors) == 1, complaint
    assert errors[0].startswith("error: ")
    assert re.search(pattern, errors[0]), errors[0]
    assert not any(token in complaint for token in TOKENS)
    assert not re.search(r"https?://\S+\?", complaint), complaint


def environment(hub: StandInHub, folder: Path) -> dict[str, str]:
    """For a process of its own that talks to this Hub as ann, with an HF_HOME below the folder."""
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": WRITER}


def in_a_process(hub: StandInHub, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """The command as a user types it in this folder."""
    command = [sys.executable, "-m", "hf_epimer", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(hub, folder), cwd=folder)


def downloads(hub: StandInHub) -> list[str]:
    return [r.path for r in hub.requests if r.method == "GET" and "/resolve/" in r.path]


def writes(hub: StandInHub) -> list[str]:
    return [
        f"{r.method} {r.path}" for r in hub.requests if r.method in ("POST", "PUT") and "validate-yaml" not in r.path
    ]


def merges(hub: StandInHub, repo: str = "org/merged") -> int:
    return sum("Merge 2 checkpoints" in commit.title for commit in hub.commits(repo))


def pickle_weights(hub: StandInHub, repo: str, *, convert: bool = True) -> PullRequest | None:
    """Give a repo the layout of openai/clip-vit-base-patch32: pickled weights on main, the safetensors in the bot's
    open pull request."""
    weights = hub.read(repo, "model.safetensors")
    hub.commit(repo, {"model.safetensors": None, "pytorch_model.bin": b"a pickle of " + repo.encode()})
    if not convert:
        return None
    title = "Adding `safetensors` variant of this model"
    return hub.open_pull_request(repo, {"model.safetensors": weights}, title=title, author="SFconvertbot")


def recipe(folder: str = "merged-epimer") -> dict[str, object]:
    """What a merged folder says of its merge, without the list of its files."""
    with open(f"{folder}/merge_config.json", encoding="utf-8") as file:
        return {name: value for name, value in json.load(file).items() if name != "files"}
