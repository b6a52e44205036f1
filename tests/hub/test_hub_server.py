"""The stand-in Hub answers the real client as the Hub would, and misbehaves only when told to."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from helpers.hub_server import Fault, StandInHub

httpx2 = pytest.importorskip("httpx2")

WEIGHTS = os.urandom(300_000)
FILES = {"config.json": b'{"a": 1}', "sub/model.safetensors": WEIGHTS, "README.md": b"---\nlicense: mit\n---\n# x\n"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    with StandInHub() as running:
        running.add_user("hf_ada", "ada", orgs={"acme": "write", "readers": "read"})
        running.add_user("hf_read", "ada", role="read", orgs=["acme"])
        running.add_user("hf_bob", "bob")
        yield running


def api(hub: StandInHub, token: str | bool = "hf_ada") -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def get(hub: StandInHub, tmp_path: Path, name: str = "sub/model.safetensors", **options: object) -> bytes:
    options = {"token": False, "repo_id": "acme/m", **options}
    path = hf_hub_download(filename=name, endpoint=hub.url, cache_dir=tmp_path / "cache", **options)
    return Path(path).read_bytes()


def test_download_and_describe(hub: StandInHub, tmp_path: Path) -> None:
    first = hub.add_repo("acme/m", FILES)
    second = hub.commit("acme/m", {"config.json": b"{}", "README.md": None})
    reader = api(hub, False)
    assert get(hub, tmp_path, revision=first) == WEIGHTS
    assert get(hub, tmp_path, "config.json", revision=first) == FILES["config.json"]
    assert get(hub, tmp_path, "config.json") == b"{}"
    info = reader.model_info("acme/m", revision=first, files_metadata=True)
    sizes = {s.rfilename: (s.size, s.lfs.sha256 if s.lfs else None) for s in info.siblings}
    assert info.sha == first and info.card_data.license == "mit"
    assert sizes["sub/model.safetensors"] == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    assert sizes["config.json"] == (8, None)
    assert reader.model_info("acme/m", expand=["sha"]).sha == second
    assert {f.path for f in reader.list_repo_tree("acme/m")} == {"config.json", "sub"}
    assert {f.path for f in reader.list_repo_tree("acme/m", recursive=True, expand=True, revision=first)} > set(FILES)
    assert [f.size for f in reader.get_paths_info("acme/m", ["config.json", "none"])] == [2]
    assert [c.commit_id for c in reader.list_repo_commits("acme/m")] == [second, first]
    assert reader.list_repo_refs("acme/m").branches[0].target_commit == second
    assert reader.resolve_revision("acme/m", cache_dir=tmp_path / "cache").resolved == second
    snapshot = snapshot_download("acme/m", revision=first, endpoint=hub.url, cache_dir=tmp_path / "s", token=False)
    assert {name: (Path(snapshot) / name).read_bytes() for name in FILES} == FILES
    url = f"{hub.url}/acme/m/resolve/main/sub/model.safetensors"
    part = httpx2.get(url, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, WEIGHTS[100:200])
    assert part.headers["Content-Range"] == f"bytes 100-199/{len(WEIGHTS)}"
    assert httpx2.get(url, headers={"Range": "bytes=-5"}).content == WEIGHTS[-5:]
    assert httpx2.get(url, headers={"Range": "bytes=999999-"}).status_code == 416


def test_commit_of_both_kinds(hub: StandInHub, tmp_path: Path) -> None:
    writer = api(hub)
    assert writer.create_repo("acme/m", private=True).repo_id == "acme/m"
    with pytest.raises(HfHubHTTPError) as refused:
        writer.create_repo("acme/m")
    assert refused.value.response.status_code == 409
    writer.create_repo("acme/m", exist_ok=True)
    folder = tmp_path / "up"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    done = writer.upload_folder(repo_id="acme/m", folder_path=folder, commit_message="both")
    assert [c.title for c in hub.commits("acme/m")] == ["both", "initial commit"]
    assert hub.commits("acme/m")[0].oid == done.oid and done.repo_url.repo_id == "acme/m"
    assert [r.method for r in hub.requests if ".git/info/lfs" in r.path] == ["POST", "PUT", "POST"]
    for name, content in FILES.items():
        assert get(hub, tmp_path, name, token="hf_ada") == content == hub.read("acme/m", name)
    hub.clear_log()
    again = writer.upload_folder(repo_id="acme/m", folder_path=folder, commit_message="same")
    assert again.oid == done.oid and not [r for r in hub.requests if "/commit/" in r.path]
    writer.delete_file("config.json", "acme/m")
    assert not writer.file_exists("acme/m", "config.json")
    writer.delete_repo("acme/m")
    assert not hub.exists("acme/m")
    writer.delete_repo("acme/m", missing_ok=True)


def test_invalid_card_is_refused(hub: StandInHub) -> None:
    hub.add_repo("acme/m", {})
    card = [CommitOperationAdd("README.md", b"---\na: [\n---\n")]
    with pytest.raises(ValueError, match="Invalid metadata"):
        api(hub).create_commit("acme/m", card, commit_message="card")


def test_pull_request_leaves_main_alone(hub: StandInHub) -> None:
    start = hub.add_repo("acme/m", FILES)
    stranger = api(hub, "hf_bob")
    change = [CommitOperationAdd("b.bin", b"bb"), CommitOperationDelete("config.json")]
    done = stranger.create_commit("acme/m", change, commit_message="offer", create_pr=True)
    assert (done.pr_num, done.pr_revision) == (1, "refs/pr/1")
    assert hub.commits("acme/m")[0].oid == start
    assert hub.read("acme/m", "b.bin", revision="refs/pr/1") == b"bb"
    assert [p.title for p in hub.pull_requests("acme/m")] == ["offer"]
    listed = list(stranger.get_repo_discussions("acme/m", discussion_type="pull_request", discussion_status="open"))
    assert [(d.num, d.author, d.is_pull_request) for d in listed] == [(1, "bob", True)]
    assert stranger.get_discussion_details("acme/m", 1).target_branch == "refs/heads/main"
    assert stranger.list_repo_refs("acme/m", include_pull_requests=True).pull_requests[0].target_commit == done.oid
    assert stranger.model_info("acme/m", revision="refs/pr/1").sha == done.oid


def test_commit_on_a_moved_branch(hub: StandInHub) -> None:
    stale = hub.add_repo("acme/m", FILES)
    hub.commit("acme/m", {"other": b"x"})
    with pytest.raises(HfHubHTTPError) as refused:
        change = [CommitOperationAdd("mine", b"y")]
        api(hub).create_commit("acme/m", change, commit_message="late", parent_commit=stale)
    assert refused.value.response.status_code == 412
    assert len(hub.commits("acme/m")) == 2


def test_whoami(hub: StandInHub) -> None:
    me = api(hub).whoami()
    assert me["name"] == "ada" and me["auth"]["accessToken"]["role"] == "write"
    assert [(org["name"], org["roleInOrg"]) for org in me["orgs"]] == [("acme", "write"), ("readers", "read")]
    hub.add_user("hf_fine", "eve", role="fineGrained", orgs=["acme"], scopes={"acme": ["repo.write"]})
    scoped = api(hub, "hf_fine").whoami()["auth"]["accessToken"]["fineGrained"]["scoped"]
    assert [(s["entity"]["name"], s["permissions"]) for s in scoped] == [("acme", ["repo.write"])]
    api(hub, "hf_fine").create_repo("acme/new")
    with pytest.raises(HfHubHTTPError, match="rights"):
        api(hub, "hf_fine").create_repo("eve/new")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api(hub, "hf_wrong").whoami()


def test_refusals(hub: StandInHub, tmp_path: Path) -> None:
    hub.add_repo("acme/m", FILES)
    hub.add_repo("acme/secret", FILES, private=True)
    hub.add_repo("zed/gated", FILES, gated=True, granted=["bob"])
    for token in (False, "hf_bob"):
        for repo_id in ("acme/none", "acme/secret"):
            with pytest.raises(RepositoryNotFoundError) as hidden:
                get(hub, tmp_path, repo_id=repo_id, token=token)
            assert hidden.value.response.status_code == (404 if token else 401)
    for token in (False, "hf_ada"):
        with pytest.raises(GatedRepoError):
            get(hub, tmp_path, repo_id="zed/gated", token=token)
        with pytest.raises(GatedRepoError):
            api(hub, token).auth_check("zed/gated")
    assert get(hub, tmp_path, repo_id="zed/gated", token="hf_bob") == WEIGHTS
    assert get(hub, tmp_path, repo_id="acme/secret", token="hf_read") == WEIGHTS
    assert api(hub, False).model_info("zed/gated").gated == "auto"
    with pytest.raises(RevisionNotFoundError):
        get(hub, tmp_path, revision="nope")
    with pytest.raises(EntryNotFoundError):
        get(hub, tmp_path, "nope.json")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        get(hub, tmp_path, token="hf_wrong")
    for token, status in ((False, 401), ("hf_read", 403), ("hf_bob", 403)):
        with pytest.raises(HfHubHTTPError) as refused:
            api(hub, token).upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="acme/m")
        assert refused.value.response.status_code == status
    for namespace in ("acme", "readers", "bob"):
        with pytest.raises(HfHubHTTPError):
            api(hub, "hf_read" if namespace == "acme" else "hf_ada").create_repo(f"{namespace}/new")
    assert len(hub.commits("acme/m")) == 1 and not any(hub.exists(f"{n}/new") for n in ("acme", "readers", "bob"))


def test_rate_limit_is_waited_out(hub: StandInHub, tmp_path: Path) -> None:
    hub.add_repo("acme/m", FILES)
    limit = hub.inject(Fault("GET", "/resolve/", status=429, headers={"Retry-After": "0"}))
    assert get(hub, tmp_path) == WEIGHTS
    assert limit.hits == 1
    assert [r.status for r in hub.requests if r.method == "GET"] == [429, 200]


def test_cut_body_is_resumed(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # it resumes only after whole chunks
    hub.add_repo("acme/m", FILES)
    hub.inject(Fault("GET", "/resolve/", cut_after=1200))
    assert get(hub, tmp_path) == WEIGHTS
    asked = [(r.status, r.headers.get("Range")) for r in hub.requests if r.method == "GET"]
    assert asked == [(200, None), (206, "bytes=1000-")]


def test_corrupt_body_passes_the_client(hub: StandInHub, tmp_path: Path) -> None:
    hub.add_repo("acme/m", FILES)
    hub.inject(Fault("GET", "/resolve/", corrupt=True))
    got = get(hub, tmp_path)
    assert len(got) == len(WEIGHTS) and sum(a != b for a, b in zip(got, WEIGHTS, strict=True)) == 1


def test_lost_answer_leaves_one_commit(hub: StandInHub) -> None:
    hub.add_repo("acme/m", FILES)
    hub.inject(Fault("POST", "/commit/", drop_answer=True))
    with pytest.raises(httpx2.RemoteProtocolError):
        api(hub).upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="acme/m", commit_message="lost")
    assert [c.title for c in hub.commits("acme/m")] == ["lost", "init"]


def test_closed_hub_does_not_answer() -> None:
    with StandInHub() as running, httpx2.Client() as client:
        running.add_repo("acme/m", FILES)
        url = f"{running.url}/api/models/acme/m"
        assert client.get(url).status_code == 200
        running.__exit__(None, None, None)
        with pytest.raises(httpx2.TransportError):
            client.get(url)


@pytest.mark.slow
def test_load_dataset(hub: StandInHub, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "label": [0, 1, 0]}), tmp_path / "train.parquet")
    hub.add_repo("acme/d", {"data/train-00000-of-00001.parquet": tmp_path / "train.parquet"}, repo_type="dataset")
    code = "import datasets; d = datasets.load_dataset('acme/d', split='train'); print(d['text'], d['label'])"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "['a', 'b', 'c']" in done.stdout and "[0, 1, 0]" in done.stdout
