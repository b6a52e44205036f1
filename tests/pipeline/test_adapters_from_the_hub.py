"""Adapters on the Hub: what is fetched, what is pushed, which base they name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from helpers.adapters import ADAPTER_FILES, FC1, folded, make, rewrite_config
from helpers.checkpoints import tiny_fisher, tiny_state, write_checkpoint
from helpers.command import Run, fails
from helpers.hub_cases import environment
from helpers.hub_server import StandInHub

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def hub(empty_hub: StandInHub, adapters: tuple[Path, Path], base_folder: Path) -> StandInHub:
    """A Hub with org/base and the adapters org/a and org/b, which name it, b at a commit."""
    empty_hub.add_repo("org/base", base_folder)
    for folder, revision in zip(adapters, (None, empty_hub.commits("org/base")[0].oid), strict=True):
        rewrite_config(folder, base_model_name_or_path="org/base", revision=revision)
        (folder / "README.md").unlink()
        empty_hub.add_repo(f"org/{folder.name}", folder)
    return empty_hub


@pytest.mark.slow
def test_adapters_from_the_hub_pushed_and_loaded_back(hub: StandInHub, run: Run, tmp_path: Path) -> None:
    pinned = hub.commits("org/base")[0].oid
    hub.commit("org/base", {"config.json": b"{}"})  # b names the commit before this one
    hub.add_repo("org/merged", write_checkpoint(tmp_path / "old", tiny_state(9)))
    code, output, complaint = run("merge", "org/a", "org/b", "--method", "tsv-m", "--push-to", "org/merged")
    assert (code, complaint) == (0, "")
    head = hub.commits("org/merged")[0]
    assert head.title == "Merge 2 adapters with tsv-m (hf-epimer)"
    assert head.oid in output
    present = set(head.files)
    assert set(ADAPTER_FILES) <= present
    assert not {"model.safetensors", "config.json"} & present  # of the checkpoint that was there before
    recipe = json.loads(hub.read("org/merged", "merge_config.json"))
    assert recipe["base"] == f"org/base@{pinned}"
    assert recipe["models"] == [f"{name}=org/{name}@{hub.commits(f'org/{name}')[0].oid}" for name in "ab"]
    card = hub.read("org/merged", "README.md").decode()
    assert re.search(r"base_model:\s+- org/base\n", card) or "base_model: org/base\n" in card
    assert f'CLIPVisionModel.from_pretrained("org/base", revision="{pinned}")' in card
    assert 'PeftModel.from_pretrained(base, "org/merged")' in card
    assert all(hub.commits(f"org/{name}")[0].oid[:12] in card for name in "ab")
    script = (
        "from peft import PeftModel\nfrom transformers import CLIPVisionModel\n"
        f"base = CLIPVisionModel.from_pretrained('org/base', revision='{pinned}')\n"
        "tuned = PeftModel.from_pretrained(base, 'org/merged').merge_and_unload().state_dict()\n"
        "print(float(next(v for k, v in tuned.items() if k.endswith('layers.0.mlp.fc1.weight'))[0, 0]))\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(hub, tmp_path)
    )
    assert loaded.returncode == 0, loaded.stderr
    expected = folded(Path("merged-tsv-m"), tmp_path / "base")[FC1][0, 0]
    assert float(loaded.stdout) == pytest.approx(float(expected), rel=1e-5)


def test_a_full_merge_pushed_over_an_adapter_leaves_no_adapter(hub: StandInHub, run: Run) -> None:
    words = ["merge", "org/a", "org/b", "--method", "mean", "--push-to", "org/merged", "--overwrite"]
    assert run(*words)[0] == 0
    assert run(*words, "--dense")[0] == 0
    present = set(hub.commits("org/merged")[0].files)
    assert {"config.json", "model.safetensors"} <= present
    assert not {"adapter_config.json", "adapter_model.safetensors"} & present
    code, _, complaint = run("push", "merged-mean", "org/again")
    assert code == 0, complaint


def test_only_needed_files_are_fetched_and_offline_works(
    hub: StandInHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.commit("org/a", {"optimizer.pt": b"x" * 1000, "adapter_model.bin": b"x"})
    assert run("merge", "org/a", "org/b", "--method", "mean", "--out", "out")[0] == 0
    paths = [r.path for r in hub.requests if r.method == "GET" and "/resolve/" in r.path]
    assert {path.split("/")[-1].split("?")[0] for path in paths} <= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    hub.clear_log()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, complaint = run("merge", "org/a", "org/b", "--method", "mean", "--out", "again")
    assert (code, complaint) == (0, "")
    assert hub.requests == []
    assert Path("out/adapter_model.safetensors").read_bytes() == Path("again/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["tsv-m"], False),
        (["frechet-lora", "--out-rank", 2], False),
        (["fisher"], True),  # works on whole layers
        (["mean", "--dense"], True),
    ],
)
def test_the_weights_of_the_base_are_fetched_only_where_they_are_read(
    words: list[Any], read: bool, hub: StandInHub, base_folder: Path, run: Run
) -> None:
    for seed, name in enumerate("cd"):
        folder = make(base_folder, name, seed, target_modules=["q_proj", "fc1"])
        rewrite_config(folder, base_model_name_or_path="org/base")
        (folder / "README.md").unlink()
        save_file(tiny_fisher(seed), folder / "fisher.safetensors", metadata={"format": "hf-epimer.fisher/1"})
        hub.add_repo(f"org/{name}", folder)
    flags = ["--base", "org/base", "--method", *words]
    plan = json.loads(run("merge", "org/c", "org/d", *flags, "--dry-run", "--json")[1])
    assert (plan["bytes_to_read"] > (base_folder / "model.safetensors").stat().st_size) == read
    code, _, complaint = run("merge", "org/c", "org/d", *flags, "--out", "out")
    assert (code, complaint) == (0, "")
    fetched = [r.path for r in hub.requests if r.method == "GET" and "/org/base/resolve/" in r.path]
    assert any("config.json" in path for path in fetched)
    assert any("model.safetensors" in path for path in fetched) == read
    local = [base_folder.parent / name for name in "cd"]
    assert run("merge", *local, "--base", base_folder, "--method", *words, "--out", "local")[0] == 0
    name = "model.safetensors" if "--dense" in words else "adapter_model.safetensors"
    assert Path("out", name).read_bytes() == Path("local", name).read_bytes()


def test_what_an_adapter_replaces_is_read_from_a_base_on_demand(
    hub: StandInHub, adapters: tuple[Path, Path], base_folder: Path, run: Run
) -> None:
    code, _, complaint = run("merge", "org/a", "org/b", "--method", "mean", "--out", "out")  # b has biases
    assert (code, complaint) == (0, "")
    fetched = [r.path for r in hub.requests if r.method == "GET" and "/org/base/resolve/" in r.path]
    assert any("model.safetensors" in path for path in fetched)
    assert run("merge", *adapters, "--base", base_folder, "--method", "mean", "--out", "local")[0] == 0
    files = [Path(folder, "adapter_model.safetensors").read_bytes() for folder in ("out", "local")]
    assert files[0] == files[1]


def test_revisions_of_the_base_must_agree(hub: StandInHub, run: Run, adapters: tuple[Path, Path]) -> None:
    old = hub.commits("org/base")[0].oid
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    hub.commit("org/a", {"adapter_config.json": json.dumps({**config, "revision": "main"}).encode()})
    words = ["merge", "org/a", "org/b", "--method", "mean", "--out", "out"]
    fails(run(*words), f"disagree on base_model: a says org/base@main, b says org/base@{old}.*--base")
    code, _, complaint = run(*words, "--base", "org/base")
    assert code == 0, complaint


def test_an_adapter_from_the_hub_names_no_folder_of_this_machine(
    hub: StandInHub, run: Run, adapters: tuple[Path, Path], base_folder: Path
) -> None:
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    moved = json.dumps({**config, "base_model_name_or_path": str(base_folder)}).encode()
    hub.commit("org/a", {"adapter_config.json": moved})
    fails(run("merge", "org/a", "--method", "mean", "--out", "out"), "org/a.*adapter_config.json names.*--base")
    hub.commit("org/a", {"adapter_config.json": moved.replace(str(base_folder).encode(), b"org/gone")})
    fails(run("merge", "org/a", "--method", "mean", "--out", "out"), "org/gone: there is no such repo")
    assert not Path("out").exists()
