"""What lies in the cache: damaged, incomplete while offline, or in a folder that cannot be written to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from helpers.command import Run
from helpers.hub_cases import downloads, fails, recipe
from helpers.hub_server import Fault, StandInHub

MERGE = ("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--method", "mean", "--out")


def cached(tmp_path: Path, repo: str, name: str) -> Path:
    return next((tmp_path / "cache").glob(f"models--{repo.replace('/', '--')}/snapshots/*/{name}"))


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors"])
def test_a_flipped_byte_is_noticed_and_fetched_again(name: str, hub: StandInHub, run: Run, tmp_path: Path) -> None:
    assert run(*MERGE, "first")[0] == 0
    file = cached(tmp_path, "org/vit-b32-dtd", name).resolve()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    code, _, complaint = run(*MERGE, "second")
    assert code == 0, complaint
    assert f"{name} is damaged" in complaint
    assert "org/vit-b32-dtd" in complaint
    assert Path("first/model.safetensors").read_bytes() == Path("second/model.safetensors").read_bytes()
    assert recipe("first") == recipe("second")
    assert run(*MERGE, "third")[2] == ""


def test_a_small_file_flipped_on_its_way_does_not_stay(hub: StandInHub, run: Run) -> None:
    fault = hub.inject(Fault(method="GET", path="dtd/resolve/.*/config.json", corrupt=True))
    code, _, complaint = run(*MERGE, "o")
    assert (code, fault.hits) == (0, 1), complaint
    hub.commit("org/base", {"config.json": hub.read("org/base", "config.json") + b"\n"})
    hub.inject(Fault(method="GET", path="base/resolve/.*/config.json", corrupt=True, times=None))
    fails(run(*MERGE, "p"), "org/base@[0-9a-f]{40}: config.json arrives with another content than the Hub lists")


def test_offline_what_is_missing_is_missing_from_the_cache(
    hub: StandInHub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*MERGE, "online")[0] == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("model.safetensors", "README.md", "config.json"):
        file = cached(tmp_path, "org/vit-b32-dtd", name)
        kept = shutil.copy(file, tmp_path / "kept")
        file.unlink()
        said = rf"org/vit-b32-dtd@[0-9a-f]{{40}}: {name} is not in the cache, and HF_HUB_OFFLINE is set"
        fails(run(*MERGE, "o"), said)
        shutil.copy(kept, file)
    assert run(*MERGE, "o")[0] == 0
    file = cached(tmp_path, "org/vit-b32-svhn", "model.safetensors").resolve()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    fails(run(*MERGE, "p"), "model.safetensors is damaged .*, and HF_HUB_OFFLINE is set")


def test_offline_from_a_cache_that_another_program_filled_in_part(
    hub: StandInHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for repo in ("org/base", "org/vit-b32-dtd", "org/vit-b32-svhn"):
        snapshot_download(repo, allow_patterns=["config.json", "preprocessor_config.json"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = (*MERGE, "o", "--base", "org/base")
    said = r"org/base@[0-9a-f]{40}: model.safetensors is not in the cache, and HF_HUB_OFFLINE is set"
    fails(run(*words), said.replace("base", "(base|vit-b32-dtd|vit-b32-svhn)"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for repo in ("org/base", "org/vit-b32-dtd", "org/vit-b32-svhn"):
        snapshot_download(repo, allow_patterns=["*.safetensors"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, complaint = run(*words)
    assert code == 0, complaint
    assert "README.md is not in the cache, and HF_HUB_OFFLINE is set" in complaint


def test_offline_by_another_name_of_the_repo(hub: StandInHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.rename("org/vit-b32-svhn", "org/vit-b32-svhn-renamed")
    words = ("merge", "Org/VIT-b32-dtd", "org/vit-b32-svhn", "--method", "mean", "--out")
    code, _, complaint = run(*words, "online")
    assert code == 0, complaint
    assert [text.split("@")[0] for text in recipe("online")["models"]] == [  # type: ignore[attr-defined]
        "dtd=org/vit-b32-dtd",
        "svhn=org/vit-b32-svhn-renamed",
    ]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, complaint = run(*words, "offline")
    assert code == 0, complaint
    assert recipe("online") == recipe("offline")


def test_a_repo_given_twice_under_two_names_is_said(hub: StandInHub, run: Run) -> None:
    code, _, complaint = run("merge", "org/vit-b32-dtd", "ORG/vit-b32-dtd", "--method", "mean", "--out", "o")
    assert code == 0
    assert "is merged twice" in complaint


@pytest.mark.parametrize("trouble", ["read-only", "a file in the way"])
def test_a_cache_that_cannot_be_written_to_is_named(
    trouble: str, hub: StandInHub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "locked"
    if trouble == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root writes everywhere")
        cache.mkdir(mode=0o500)
    else:
        cache.write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    fails(run(*MERGE, "o"), rf"org/vit-b32-dtd.*: \S+ cannot be written to the cache {cache} \(.*set HF_HOME")


def test_a_full_disk_is_named(hub: StandInHub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from huggingface_hub import file_download

    def full(*words: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    fails(run(*MERGE, "o"), "org/vit-b32-dtd.*README.md cannot be written to the cache .*No space left.*HF_HOME")


def test_a_cache_filled_before_there_were_notes_goes_on_offline(
    hub: StandInHub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*MERGE, "online")[0] == 0
    for repo in ("base", "vit-b32-dtd", "vit-b32-svhn"):
        folder = tmp_path / "cache" / f"models--org--{repo}"
        note = json.loads((folder / ".hf-epimer" / "main.json").read_text())
        shutil.rmtree(folder / ".hf-epimer")
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(note["commit"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.clear_log()
    code, _, complaint = run(*MERGE, "offline")
    assert (code, complaint, downloads(hub)) == (0, "", [])
    assert Path("online/model.safetensors").read_bytes() == Path("offline/model.safetensors").read_bytes()
