"""The real huggingface_hub client against a stand-in Hub: the mission command, pinning, rights, faults, pushes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.command import Run
from helpers.hub_cases import MISSION, TOKENS, downloads, environment, fails, in_a_process, merges, writes
from helpers.hub_server import READER, STRANGER, WRITER, Fault, StandInHub


@pytest.mark.slow
def test_the_mission_command(hub: StandInHub, tmp_path: Path) -> None:
    """In a process of its own, as a user types it; then the pushed repo loads with transformers from the Hub."""
    done = in_a_process(hub, tmp_path, *MISSION)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "pushed" in done.stdout
    commits = hub.commits("org/merged")
    assert len([c for c in commits if "Merge 2 checkpoints with epimer" in c.title]) == 1
    script = (
        "from transformers import CLIPVisionModel\n"
        "m, report = CLIPVisionModel.from_pretrained('org/merged', output_loading_info=True)\n"
        "assert not report['missing_keys'] and not report['unexpected_keys'], report\n"
        "print(float(m.state_dict()[[k for k in m.state_dict() if k.endswith('post_layernorm.bias')][0]][0]))\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(hub, tmp_path)
    )
    assert loaded.returncode == 0, loaded.stderr
    merged = load_file(tmp_path / "merged-epimer" / "model.safetensors")
    assert float(loaded.stdout) == pytest.approx(float(merged["vision_model.post_layernorm.bias"][0]))


def test_a_push_is_one_commit_with_a_card_the_hub_accepts(hub: StandInHub, run: Run, tmp_path: Path) -> None:
    code, output, complaint = run(*MISSION)
    assert (code, complaint) == (0, "")
    head = hub.commits("org/merged")[0]
    assert {"README.md", "config.json", "model.safetensors", "merge_config.json"} <= set(head.files)
    assert sum("/commit/main" in entry for entry in writes(hub)) == 1
    assert head.oid in output
    assert any("validate-yaml" in r.path for r in hub.requests)
    recipe = json.loads(hub.read("org/merged", "merge_config.json"))
    oids = [hub.commits(f"org/vit-b32-{task}")[0].oid for task in ("dtd", "svhn")]
    assert recipe["models"] == [f"{t}=org/vit-b32-{t}@{oid}" for t, oid in zip(("dtd", "svhn"), oids, strict=True)]
    assert recipe["base"] == f"org/base@{hub.commits('org/base')[0].oid}"
    card = hub.read("org/merged", "README.md").decode()
    assert "base_model:\n- org/vit-b32-dtd\n- org/vit-b32-svhn" in card
    assert "datasets:\n- tanganke/dtd\n- ufldl-stanford/svhn" in card
    assert oids[0][:12] in card
    assert "hf-epimer merge org/vit-b32-dtd org/vit-b32-svhn --push-to org/merged" in card
    assert not any(token in (tmp_path / "merged-epimer" / n).read_text(errors="replace") for token in TOKENS
                   for n in ("README.md", "merge_config.json", "merge_report.json"))  # fmt: skip


def test_only_needed_files_of_pinned_commits_are_fetched(hub: StandInHub, run: Run) -> None:
    hub.commit("org/vit-b32-dtd", {"training/optimizer.pt": b"x" * 1000, "pytorch_model.bin": b"x"})
    old = hub.commits("org/vit-b32-svhn")[0].oid
    hub.commit("org/vit-b32-svhn", {"config.json": b"{}"})
    code, _, complaint = run("merge", "org/vit-b32-dtd", f"org/vit-b32-svhn@{old}", "--out", "out")
    assert code == 0, complaint
    names = {path.split("/")[-1].split("?")[0] for path in downloads(hub)}
    assert names <= {
        "config.json", "model.safetensors", "fisher.safetensors", "README.md", "preprocessor_config.json",
    }  # fmt: skip
    assert all(re.search(r"/resolve/[0-9a-f]{40}/", path) for path in downloads(hub))
    hub.clear_log()
    code, _, complaint = run("merge", "--config", "out/merge_config.json", "--out", "again")
    assert code == 0, complaint
    assert downloads(hub) == []  # everything came from the cache
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_offline_from_the_cache(hub: StandInHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--out", "online")[0] == 0
    hub.clear_log()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, complaint = run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--out", "offline")
    assert code == 0, complaint
    assert hub.requests == []
    assert Path("online/model.safetensors").read_bytes() == Path("offline/model.safetensors").read_bytes()
    fails(run("merge", "org/unseen", "--out", "o2"), "HF_HUB_OFFLINE|local cache")


def test_a_damaged_cache_entry_is_named_and_fetched_again(hub: StandInHub, run: Run, tmp_path: Path) -> None:
    assert run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--out", "first")[0] == 0
    file = next((tmp_path / "cache").glob("models--org--vit-b32-dtd/snapshots/*/model.safetensors")).resolve()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    code, _, complaint = run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--out", "second")
    assert code == 0
    assert "damaged" in complaint
    assert "org/vit-b32-dtd" in complaint
    assert Path("first/model.safetensors").read_bytes() == Path("second/model.safetensors").read_bytes()


def test_a_body_corrupted_on_the_way(hub: StandInHub, run: Run) -> None:
    fault = hub.inject(Fault(method="GET", path=r"svhn/resolve/.*/model\.safetensors", corrupt=True, times=1))
    code, _, complaint = run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--out", "out")
    assert (code, fault.hits) == (0, 1)
    assert "damaged" in complaint
    hub.inject(Fault(method="GET", path=r"base/resolve/.*/model\.safetensors", corrupt=True, times=None))
    hub.commit("org/base", {"note.txt": b"a new commit, so that nothing is cached"})
    file = hub.read("org/base", "model.safetensors")
    hub.commit("org/base", {"model.safetensors": file[:-1] + bytes([file[-1] ^ 2])})
    fails(run("merge", "org/vit-b32-dtd", "--out", "o2"), r"model\.safetensors arrives with another sha256")
    assert not Path("o2").exists()


def test_a_body_cut_on_the_way_is_resumed(hub: StandInHub, run: Run) -> None:
    fault = hub.inject(Fault(method="GET", path=r"svhn/resolve/.*/model\.safetensors", cut_after=5000, times=1))
    code, _, complaint = run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--out", "out")
    assert (code, fault.hits) == (0, 1), complaint


# --- who may do what, found out before the work ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "target", "pattern"),
    [
        (None, "org/merged", "no token"),
        ("hf_wrong", "org/merged", "does not accept the token"),
        (READER, "org/merged", "read-only"),
        (STRANGER, "org/merged", "bob may not create a repo under org"),
        (WRITER, "elsewhere/merged", "ann may not create a repo under elsewhere"),
        (STRANGER, "org/base", "no permission|may not"),
    ],
)
def test_rights_are_checked_before_the_work(
    token: str | None, target: str, pattern: str, hub: StandInHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    fails(run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--push-to", target), pattern)
    assert downloads(hub) == []
    assert writes(hub) == []
    assert not Path("merged-epimer").exists()


def test_private_and_gated_repos(hub: StandInHub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("org/private-dtd", tmp_path / "src" / "dtd", private=True)
    hub.add_repo("org/gated-dtd", tmp_path / "src" / "dtd", gated=True)
    for name in ("private", "gated"):
        assert run("merge", f"org/{name}-dtd", "--out", name)[0] == 0
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    fails(run("merge", "org/private-dtd", "--out", "o"), "org/private-dtd: there is no such repo, or it is private")
    hub.commit("org/gated-dtd", {"x.txt": b"new commit"})
    fails(run("merge", "org/gated-dtd", "--out", "o"), "org/gated-dtd.* is gated: accept its terms")
    monkeypatch.delenv("HF_TOKEN")
    fails(run("merge", "org/private-dtd", "--out", "o"), "org/private-dtd: there is no such repo, or it is private")
    assert not Path("o").exists()


def test_unknown_repos_and_revisions(hub: StandInHub, run: Run) -> None:
    fails(run("merge", "org/nothing", "--out", "o"), "org/nothing: there is no such repo")
    fails(
        run("merge", "org/vit-b32-dtd@nowhere", "--out", "o"), "org/vit-b32-dtd@nowhere: the repo has no such revision"
    )
    fails(run("merge", "org/vit-b32-dtd", "--base", "org/nobase", "--out", "o"), "org/nobase: there is no such repo")


def test_a_pickle_only_repo_is_refused_without_downloading_it(hub: StandInHub, run: Run, tmp_path: Path) -> None:
    files = {"config.json": (tmp_path / "src/dtd/config.json").read_bytes(), "pytorch_model.bin": b"x" * 100}
    hub.add_repo("org/pickled", files)
    fails(run("merge", "org/pickled", "--base", "org/base", "--out", "o"), "only pickled weights")
    assert not any("pytorch_model" in path for path in downloads(hub))


def test_missing_fisher_is_found_out_before_any_weight_is_fetched(hub: StandInHub, run: Run) -> None:
    hub.commit("org/vit-b32-svhn", {"fisher.safetensors": None})
    fails(run(*MISSION), r"Fisher information of svhn=org/vit-b32-svhn@[0-9a-f]{40}.*--fisher.*tsv-m")
    assert not any("safetensors" in path for path in downloads(hub))
    assert writes(hub) == []


def test_bases_from_cards_must_agree_and_unknown_shapes_need_a_base(hub: StandInHub, run: Run) -> None:
    hub.commit("org/vit-b32-svhn", {"README.md": b"---\nbase_model: org/other\n---\n"})
    fails(run(*MISSION), "disagree on base_model: dtd says org/base, svhn says org/other")


def test_the_shape_of_a_well_known_model_names_the_base(hub: StandInHub, run: Run, tmp_path: Path) -> None:
    config = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 32}
    content = json.loads((tmp_path / "src/dtd/config.json").read_text()) | config | {"image_size": 224}
    hub.add_repo("org/no-card", {"config.json": json.dumps(content).encode(), "model.safetensors": b""})
    fails(run("merge", "org/no-card", "--out", "o"), "openai/clip-vit-base-patch32: there is no such repo")


# --- a Hub in trouble -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 500}, {"status": 429, "headers": {"Retry-After": "0"}},
                                   {"drop_answer": True}])  # fmt: skip
def test_passing_trouble_is_waited_out(fault: dict[str, object], hub: StandInHub, run: Run) -> None:
    injected = hub.inject(Fault(method="GET", path="/api/models/org/vit-b32-dtd", times=1, **fault))  # type: ignore[arg-type]
    code, _, complaint = run(*MISSION)
    assert (code, injected.hits) == (0, 1), complaint


@pytest.mark.parametrize(
    ("status", "pattern"), [(500, "the Hub answered 500"), (429, "429"), (403, "no permission"), (401, "token")]
)
def test_lasting_trouble_is_an_error(status: int, pattern: str, hub: StandInHub, run: Run) -> None:
    hub.inject(Fault(method="GET", path="/api/models/org/vit-b32-dtd", status=status, times=None))
    fails(run("merge", "org/vit-b32-dtd", "--out", "o"), f"org/vit-b32-dtd.*{pattern}")


def test_retry_after_is_honoured(hub: StandInHub, run: Run) -> None:
    hub.inject(
        Fault(method="GET", path="/api/models/org/vit-b32-dtd", status=429, headers={"Retry-After": "2"}, times=1)
    )
    started = time.monotonic()
    assert run("merge", "org/vit-b32-dtd", "--out", "o")[0] == 0
    assert time.monotonic() - started >= 2


def test_no_network(hub: StandInHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    fails(run("merge", "org/vit-b32-dtd", "--out", "o"), "127.0.0.1:9 cannot be reached")


# --- pushes that go wrong -------------------------------------------------------------------------------------------


def test_a_lost_answer_makes_no_second_commit(hub: StandInHub, run: Run) -> None:
    fault = hub.inject(Fault(method="POST", path="/commit/main", drop_answer=True, times=1))
    code, output, complaint = run(*MISSION)
    assert (code, fault.hits, merges(hub)) == (0, 1, 1), complaint
    assert hub.commits("org/merged")[0].oid in output


def test_a_failed_push_keeps_the_folder_and_names_the_command(hub: StandInHub, run: Run) -> None:
    hub.inject(Fault(method="POST", path="/commit/main", status=500, times=None))
    result = run(*MISSION)
    fails(result, r"500.*push it again with: hf-epimer push merged-epimer org/merged")
    assert Path("merged-epimer/model.safetensors").exists()
    assert merges(hub) == 0
    hub.faults.clear()
    code, output, complaint = run("push", "merged-epimer", "org/merged")
    assert (code, merges(hub)) == (0, 1), complaint
    assert "pushed" in output


def test_trouble_while_uploading_is_waited_out(hub: StandInHub, run: Run) -> None:
    fault = hub.inject(Fault(method="POST", path="/commit/main", status=503, times=1))
    assert run(*MISSION)[0] == 0
    assert (fault.hits, merges(hub)) == (1, 1)


def test_pull_requests(hub: StandInHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("org/merged", {"README.md": b"theirs"})
    fault = hub.inject(Fault(method="POST", path="/commit/main", drop_answer=True, times=1))
    code, output, complaint = run(*MISSION, "--create-pr")
    assert code == 0, complaint
    requests = hub.pull_requests("org/merged")
    assert (len(requests), fault.hits) == (1, 1)
    assert requests[0].url in output
    assert hub.read("org/merged", "README.md") == b"theirs"
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    code, _, complaint = run("push", "merged-epimer", "org/merged", "--create-pr")
    assert code == 0, complaint
    assert len(hub.pull_requests("org/merged")) == 2
    fails(run("push", "merged-epimer", "bob/none", "--create-pr"), "needs a repo that exists")


def test_a_second_push_removes_the_shards_of_the_first(hub: StandInHub, run: Run) -> None:
    hub.add_repo(
        "org/merged", {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}", "k": b""}
    )
    assert run(*MISSION)[0] == 0
    files = hub.commits("org/merged")[0].files
    assert "k" in files
    assert not any(name in files for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"))


def test_the_hint_after_a_failed_push_keeps_its_flags_and_is_quoted(hub: StandInHub, run: Run) -> None:
    hub.inject(Fault(method="POST", path="/commit/main", status=500, times=None))
    result = run(*MISSION, "--private", "--out", "my merge")
    fails(result, r"hf-epimer push 'my merge' org/merged --private$")


def test_a_public_repo_does_not_become_private_by_a_push(hub: StandInHub, run: Run) -> None:
    hub.add_repo("org/merged", {"README.md": b"public"})
    fails(run(*MISSION, "--private"), "exists and is public", 2)
    assert writes(hub) == []


def test_an_input_is_no_place_to_push_to(hub: StandInHub, run: Run) -> None:
    fails(run(*MISSION[:3], "--push-to", "org/vit-b32-dtd"), "one of the checkpoints to merge", 2)


def test_old_statistics_do_not_stay_beside_new_weights(hub: StandInHub, run: Run) -> None:
    hub.add_repo("org/merged", {"fisher.safetensors": b"old", "results.json": b"{}", "notes.txt": b"mine"})
    assert run(*MISSION)[0] == 0
    files = hub.commits("org/merged")[0].files
    assert "notes.txt" in files
    assert not {"fisher.safetensors", "results.json"} & set(files)


def test_a_card_from_the_hub_cannot_point_at_local_folders(hub: StandInHub, run: Run, tmp_path: Path) -> None:
    for name in (str(tmp_path / "src" / "base"), "base", "[1]"):
        hub.commit("org/vit-b32-svhn", {"README.md": f"---\nbase_model: {name}\n---\n".encode()})
        fails(run("merge", "org/vit-b32-svhn", "--out", "o"), "its card names base_model .*--base")


def test_private_push(hub: StandInHub, run: Run) -> None:
    from huggingface_hub import HfApi

    assert run(*MISSION, "--private")[0] == 0
    assert HfApi().model_info("org/merged").private


def test_only_merged_folders_are_pushed(hub: StandInHub, run: Run, tmp_path: Path) -> None:
    fails(run("push", tmp_path / "src" / "dtd", "org/merged"), "is no merged folder")
    assert writes(hub) == []


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.6])
def test_a_killed_push_is_one_commit_or_none(delay: float, hub: StandInHub, run: Run, tmp_path: Path) -> None:
    assert run(*MISSION[:3], "--out", "merged")[0] == 0
    hub.inject(Fault(method="*", path="merged", delay=0.15, times=None))
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_epimer", "push", "merged", "org/merged"],
        env=environment(hub, tmp_path),
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 20
    while not any("merged" in r.path for r in hub.requests[-3:]) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    time.sleep(0.3)
    hub.faults.clear()
    if hub.exists("org/merged"):
        head = hub.commits("org/merged")[0]
        assert merges(hub) in (0, 1)
        assert ("model.safetensors" in head.files) == (merges(hub) == 1)
    assert run("push", "merged", "org/merged")[0] == 0
    assert merges(hub) == 1


def test_a_diagnosis_reads_pinned_weights_and_writes_nothing_to_the_hub(hub: StandInHub, run: Run) -> None:
    code, output, complaint = run("diagnose", "org/vit-b32-dtd", "org/vit-b32-svhn", "--rank", 4, "--json")
    assert (code, complaint) == (0, "")
    found = json.loads(output)
    heads = {task: hub.commits(f"org/vit-b32-{task}")[0].oid for task in ("dtd", "svhn")}
    assert found["models"] == [f"{task}=org/vit-b32-{task}@{head}" for task, head in heads.items()]
    assert found["totals"]["ranks"][0]["curvature"]["eta"] > 0
    assert not [path for path in downloads(hub) if path.endswith("preprocessor_config.json")]
    assert writes(hub) == []
