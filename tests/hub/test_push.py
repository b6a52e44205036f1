"""Pushes that are refused, interrupted or aimed at the wrong repo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.checkpoints import StateDict, tiny_state, write_checkpoint
from helpers.command import Run
from helpers.hub_cases import MISSION, downloads, fails, merges, writes
from helpers.hub_server import STRANGER, Fault, StandInHub
from hf_epimer.hub import retry

LFS = r"\.git/info/lfs"


@pytest.mark.parametrize(
    ("path", "fault", "said"),
    [
        (f"{LFS}/objects/[0-9a-f]{{64}}", {"status": 403}, "no permission for the upload of model.safetensors"),
        (f"{LFS}/objects/[0-9a-f]{{64}}", {"status": 400}, "400 to the request for the upload of model.safetensors"),
        (f"{LFS}/objects/[0-9a-f]{{64}}", {"status": 500}, "500 to the request for the upload of model.safetensors"),
        (f"{LFS}/objects/[0-9a-f]{{64}}", {"reset": True}, "the connection .* broke.*the upload of model.safetensors"),
        (f"{LFS}/objects/batch", {"status": 403}, "no permission for the commit"),
        (f"{LFS}/verify", {"status": 404}, "404 to the request for the upload of model.safetensors"),
        ("/preupload/", {"status": 403}, "no permission for the commit"),
        ("/commit/", {"status": 400, "body": b'{"error": "the pre-receive hook says no"}'}, "400.*hook says no"),
        ("/commit/", {"status": 412}, "412"),
        ("/commit/", {"reset": True}, "the connection .* broke"),
    ],
)  # fmt: skip
def test_a_refused_upload_is_an_error_with_the_command_that_tries_again(
    path: str, fault: dict[str, object], said: str, hub: StandInHub, run: Run, patient: None
) -> None:
    hub.inject(Fault(method="*", path=path, times=None, **fault))  # type: ignore[arg-type]
    fails(run(*MISSION), rf"^error: org/merged: .*{said}.*push it again with: hf-epimer push merged-epimer org/merged$")
    assert Path("merged-epimer/model.safetensors").exists()
    assert merges(hub) == 0
    hub.faults.clear()
    assert run("push", "merged-epimer", "org/merged")[0] == 0
    assert merges(hub) == 1


def test_the_query_of_a_signed_address_is_in_no_error(hub: StandInHub, run: Run, patient: None) -> None:
    body = json.dumps({"transfer": "basic", "objects": []})
    hub.signature = "?X-Amz-Signature=secret"
    for status in (403, 400, 500):
        hub.faults.clear()
        hub.inject(Fault(method="PUT", path=f"{LFS}/objects/", status=status, body=body.encode(), times=None))
        _, output, complaint = run(*MISSION, "--overwrite")
        assert str(status) in complaint
        assert "secret" not in output + complaint


@pytest.mark.parametrize("name", ["a--b", "a..b", "x.git", "n" * 97, "zürich", "-a", "a-"])
def test_names_that_no_repo_can_have_are_found_out_before_anything(name: str, hub: StandInHub, run: Run) -> None:
    fails(run(*MISSION[:3], "--push-to", f"org/{name}"), f"'org/{name}'", 2)
    Path("done").mkdir()
    fails(run("push", "done", f"org/{name}"), f"'org/{name}'", 2)
    assert hub.requests == []


@pytest.mark.parametrize("target", ["org/base", "ORG/Base", "Org/VIT-b32-dtd", "org/old-name"])
def test_no_input_is_pushed_over_however_it_is_named(
    target: str, hub: StandInHub, run: Run, tmp_path: Path, base_state: StateDict
) -> None:
    hub.add_repo("org/old-name", write_checkpoint(tmp_path / "third", tiny_state(3, base_state)))
    hub.rename("org/old-name", "org/new-name")
    words = ("merge", "org/vit-b32-dtd", "org/new-name", "--base", "org/base", "--method", "mean", "--push-to", target)
    fails(run(*words), "--push-to .* is one of the checkpoints to merge, or their base", 2)
    assert writes(hub) == []
    assert not any("safetensors" in path for path in downloads(hub))


def test_a_base_that_the_cards_name_is_not_pushed_over(hub: StandInHub, run: Run) -> None:
    before = hub.commits("org/base")[0].oid
    fails(run(*MISSION[:3], "--push-to", "org/Base"), "is one of the checkpoints to merge, or their base", 2)
    assert run(*MISSION[:3], "--out", "merged")[0] == 0
    fails(run("push", "merged", "org/BASE"), "is one of the checkpoints to merge, or their base", 2)
    assert hub.commits("org/base")[0].oid == before


def test_an_interrupted_pull_request_is_found_again(hub: StandInHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("org/merged", {"README.md": b"theirs"})
    with monkeypatch.context() as impatient:
        impatient.setattr(retry, "BACKOFF", ())
        hub.inject(Fault(method="POST", path="/commit/main", drop_answer=True))
        fails(run(*MISSION, "--create-pr"), "push merged-epimer org/merged --create-pr")
    for _ in range(2):
        code, output, complaint = run("push", "merged-epimer", "org/merged", "--create-pr")
        assert code == 0, complaint
        assert hub.pull_requests("org/merged")[0].url in output
    assert len(hub.pull_requests("org/merged")) == 1
    assert run("merge", *MISSION[1:3], "--method", "mean", "--push-to", "org/merged", "--create-pr")[0] == 0
    assert len(hub.pull_requests("org/merged")) == 2  # another merge is another request
    hub.pull_requests("org/merged")[0].status = "closed"
    assert run("push", "merged-epimer", "org/merged", "--create-pr")[0] == 0
    assert len(hub.pull_requests("org/merged")) == 3
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert run("push", "merged-epimer", "org/merged", "--create-pr")[0] == 0
    assert len(hub.pull_requests("org/merged")) == 4  # somebody else's is not ours


def test_local_folders_reach_the_hub_by_their_names_only(hub: StandInHub, run: Run, tmp_path: Path) -> None:
    base, dtd = tmp_path / "src" / "base", tmp_path / "src" / "dtd"
    (tmp_path / "dtd.yaml").write_text("name: dtd\ndataset: org/data\ntemplates: ['a {}.']\n")
    words = ("merge", f"dtd={dtd}", "org/vit-b32-svhn", "--base", base, "--task", tmp_path / "dtd.yaml")
    epimer = ("--method", "epimer")
    assert run(*words, *epimer, "--push-to", "org/merged", "--fisher", f"svhn={tmp_path / 'src' / 'svhn'}")[0] == 0
    local = json.loads(Path("merged-epimer/merge_config.json").read_text())
    assert local["base"] == str(base)
    assert local["models"][0] == f"dtd={dtd}"
    pushed = json.loads(hub.read("org/merged", "merge_config.json"))
    assert pushed["base"] == "base"
    assert pushed["models"] == ["dtd=dtd", local["models"][1]]
    assert pushed["fisher"] == ["dtd=dtd", "svhn=svhn"]
    assert pushed["tasks"] == ["dtd.yaml"]
    assert {key: value for key, value in pushed.items() if key not in ("base", "models", "fisher", "tasks")} == {
        key: value for key, value in local.items() if key not in ("base", "models", "fisher", "tasks")
    }
    for name, blob in hub.commits("org/merged")[0].files.items():
        if not name.endswith(".safetensors"):
            assert str(tmp_path) not in blob.path.read_text(), name
    assert run("merge", "--config", "merged-epimer/merge_config.json", "--out", "again")[0] == 0


def test_a_second_answer_lost_and_files_deleted_is_still_one_commit(hub: StandInHub, run: Run) -> None:
    hub.add_repo("org/merged", {"fisher.safetensors": b"old", "results.json": b"{}"})
    lost = hub.inject(Fault(method="POST", path="/commit/main", drop_answer=True))
    code, _, complaint = run(*MISSION)
    assert (code, lost.hits, merges(hub)) == (0, 1, 1), complaint
    assert "fisher.safetensors" not in hub.commits("org/merged")[0].files


def test_nothing_is_pushed_that_the_merge_did_not_write(hub: StandInHub, run: Run) -> None:
    assert run(*MISSION[:3], "--out", "merged")[0] == 0
    Path("merged/.env").write_text("HF_TOKEN=hf_secret")
    Path("merged/training_args.bin").write_text("pickled")
    assert run("push", "merged", "org/merged")[0] == 0
    pushed = hub.commits("org/merged")[0].files
    assert {".env", "training_args.bin"}.isdisjoint(pushed)
    assert "model.safetensors" in pushed


def test_a_folder_with_cut_weights_is_not_pushed(hub: StandInHub, run: Run) -> None:
    assert run(*MISSION[:3], "--out", "merged")[0] == 0
    weights = Path("merged/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    fails(run("push", "merged", "org/merged"), r"merged: model.safetensors has \d+ bytes instead of \d+")
    weights.unlink()
    fails(run("push", "merged", "org/merged"), "merged: model.safetensors, which the merge wrote, is missing")
    assert not hub.exists("org/merged")
