"""Repos with pickled weights only, as openai/clip-vit-base-patch32: their safetensors lie in the bot's pull request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.command import Run
from helpers.hub_cases import MISSION, downloads, fails, in_a_process, pickle_weights, recipe
from helpers.hub_server import Fault, StandInHub


@pytest.mark.slow
def test_the_mission_command_on_a_base_in_the_bots_pull_request(hub: StandInHub, run: Run, tmp_path: Path) -> None:
    pull = pickle_weights(hub, "org/base")
    assert pull is not None
    done = in_a_process(hub, tmp_path, *MISSION)
    assert done.returncode == 0, done.stderr
    commit = hub.commits("org/base", revision=pull.revision)[0].oid
    asked = hub.commits("org/base")[0].oid
    assert len(done.stderr.splitlines()) == 1
    for said in ("org/base", "only pickled weights", "SFconvertbot", "refs/pr/1", commit):
        assert said in done.stderr
    assert not any("pytorch_model" in path for path in downloads(hub))
    pushed = json.loads(hub.read("org/merged", "merge_config.json"))
    assert pushed["base"] == f"org/base@{commit}"
    assert pushed["conversions"] == {f"org/base@{commit}": {"pull_request": 1, "asked": asked, "kept": []}}
    card = hub.read("org/merged", "README.md").decode()
    assert f"`{commit[:12]}` (SFconvertbot's pull request 1, refs/pr/1)" in card


def test_a_conversion_is_found_for_checkpoints_too_and_repeats_by_its_commit(hub: StandInHub, run: Run) -> None:
    assert run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--out", "plain")[0] == 0
    for repo in ("org/base", "org/vit-b32-dtd"):
        pickle_weights(hub, repo)
    assert run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--out", "out")[0] == 0
    assert Path("plain/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    for pull in (hub.pull_requests("org/base"), hub.pull_requests("org/vit-b32-dtd")):
        pull[0].status = "closed"  # its commit is still there
    assert run("merge", "--config", "out/merge_config.json", "--out", "again")[0] == 0
    assert Path("plain/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_a_later_commit_to_the_card_does_not_hide_it_and_its_card_counts(hub: StandInHub, run: Run) -> None:
    hub.commit("org/vit-b32-svhn", {"README.md": None})
    pull = pickle_weights(hub, "org/vit-b32-svhn")
    assert pull is not None
    hub.commit("org/vit-b32-svhn", {"README.md": b"---\nbase_model: org/base\n---\n"})
    code, _, complaint = run("merge", "org/vit-b32-svhn", "--method", "mean", "--out", "o")
    assert code == 0, complaint
    assert "differ" not in complaint
    hub.commit("org/vit-b32-svhn", {"preprocessor_config.json": b"{}"})
    code, _, complaint = run("merge", "org/vit-b32-svhn", "--method", "mean", "--out", "p")
    assert code == 0
    assert "(where preprocessor_config.json differ)" in complaint


@pytest.mark.parametrize("change", ["author", "title", "status", "weights", "nothing in it"])
def test_no_other_pull_request_counts(change: str, hub: StandInHub, run: Run) -> None:
    pull = pickle_weights(hub, "org/base")
    assert pull is not None
    if change == "author":
        pull.author = "mallory"
    elif change == "title":
        pull.title = "Better weights"
    elif change == "status":
        pull.status = "closed"
    elif change == "weights":
        hub.commit("org/base", {"pytorch_model.bin": b"trained further"})
    else:
        hub.commit("org/base", {"model.safetensors": None}, revision=pull.revision)
    result = run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--out", "o")
    fails(
        result,
        "org/base.*only pickled weights.*no open pull request.*org/base@refs/pr/NUMBER.*CLIPModel.*CLIPProcessor",
    )
    assert not Path("o").exists()


def test_the_way_that_the_error_gives_works(hub: StandInHub, run: Run) -> None:
    pull = pickle_weights(hub, "org/base")
    assert pull is not None
    pull.author = "somebody-trusted"
    words = ("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--out", "o")
    assert run(*words)[0] == 1
    code, _, complaint = run(*words, "--base", "org/base@refs/pr/1")
    assert (code, complaint) == (0, "")
    assert recipe("o")["base"] == f"org/base@{hub.commits('org/base', revision=pull.revision)[0].oid}"


def test_offline_later_it_is_the_same_merge(hub: StandInHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    pickle_weights(hub, "org/base")
    assert run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--out", "online")[0] == 0
    hub.clear_log()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, complaint = run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--out", "offline")
    assert (code, hub.requests) == (0, []), complaint
    assert Path("online/model.safetensors").read_bytes() == Path("offline/model.safetensors").read_bytes()
    assert recipe("online") == recipe("offline")


def test_a_search_that_fails_is_said_where_the_weights_are_needed(hub: StandInHub, run: Run) -> None:
    pickle_weights(hub, "org/base")
    hub.inject(Fault(method="GET", path="/discussions", status=500, times=None))
    result = run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--out", "o")
    fails(result, "org/base.*only pickled weights.*could not be found out.*the Hub answered 500")


def test_one_request_per_reference_where_there_are_safetensors(hub: StandInHub, run: Run) -> None:
    assert run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--method", "mean", "--out", "o")[0] == 0
    for repo in ("base", "vit-b32-dtd", "vit-b32-svhn"):
        assert sum(f"/api/models/org/{repo}" in r.path for r in hub.requests) == 1


def test_statistics_on_main_go_with_converted_weights(hub: StandInHub, run: Run) -> None:
    """The bot's commit does not have those that were published since; a repeated merge finds them again."""
    fisher = hub.read("org/vit-b32-dtd", "fisher.safetensors")
    assert run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--out", "plain")[0] == 0
    hub.commit("org/vit-b32-dtd", {"fisher.safetensors": None})
    pickle_weights(hub, "org/vit-b32-dtd")
    hub.commit("org/vit-b32-dtd", {"fisher.safetensors": fisher})
    assert run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--out", "out")[0] == 0
    code, _, complaint = run("merge", "--config", "out/merge_config.json", "--out", "again")
    assert code == 0, complaint
    for folder in ("out", "again"):
        assert Path("plain/model.safetensors").read_bytes() == Path(folder, "model.safetensors").read_bytes()
    assert (
        Path("out/merge_config.json").read_text().split('"files"')[0]
        == Path("again/merge_config.json").read_text().split('"files"')[0]
    )


def test_adapters_need_no_weights_of_their_base(
    empty_hub: StandInHub, base_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers import adapters

    empty_hub.add_repo("org/base", base_folder)
    for seed, name in enumerate("ab", start=1):
        folder = adapters.make(base_folder, name, seed)
        adapters.rewrite_config(folder, base_model_name_or_path="org/base")
        (folder / "README.md").unlink()
        empty_hub.add_repo(f"org/{name}", folder)
    words = ("merge", "org/a", "org/b", "--method", "tsv-m")
    assert run(*words, "--out", "plain")[0] == 0
    pickle_weights(empty_hub, "org/base", convert=False)
    code, _, complaint = run(*words, "--out", "out")
    assert (code, complaint) == (0, "")
    name = "adapter_model.safetensors"
    assert Path("plain", name).read_bytes() == Path("out", name).read_bytes()
    fails(run(*words, "--dense", "--out", "dense"), "org/base.*only pickled weights")
    plan = run(*words, "--dry-run")
    assert plan[0] == 0, plan[2]
