"""Fixtures for every room: small checkpoints and data, the command, the page, a Hub of its own; `helpers` make them."""

from __future__ import annotations

import atexit
import os
import shutil
import string
import tempfile
import threading

from hf_epimer.cli.terminal import silence_libraries

# before torch and the libraries are imported: no network, no spinning threads, plain HTTP uploads, no progress bars
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
silence_libraries()
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-epimer-tests-")  # also for the processes that tests start
os.environ.pop("HF_TOKEN", None)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download, utils

pytest.register_assert_rewrite("helpers")

from helpers.checkpoints import TINY, StateDict, tiny_fisher, tiny_state, write_checkpoint
from helpers.clip import write_clip, write_tuned
from helpers.data import write_benchmark, write_data
from helpers.hub_server import WRITER, StandInHub
from helpers.space_app import SpaceApp
from hf_epimer.checkpoints.cache import remove_spare
from hf_epimer.checkpoints.reader import Checkpoint
from hf_epimer.hub import retry
from hf_epimer.models.clip import CLIP
from hf_epimer.tasks.task import benchmark_tasks


@pytest.fixture
def base_state() -> StateDict:
    return tiny_state(0)


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", tiny_state(0))


@pytest.fixture
def base(base_folder: Path) -> Checkpoint:
    source = Checkpoint("base", [base_folder / "model.safetensors"], CLIP.canonical)
    source.shapes = {name: source.shapes[name] for name in CLIP.shapes(TINY)}
    return source


@pytest.fixture
def tiny_zoo(tmp_path: Path) -> Path:
    """base/ and three fine-tuned checkpoints a/, b/, c/ with Fisher information."""
    base = tiny_state(0)
    write_checkpoint(tmp_path / "zoo" / "base", base)
    for index, name in enumerate("abc", start=1):
        write_checkpoint(tmp_path / "zoo" / name, tiny_state(index, base), fisher=tiny_fisher(10 + index))
    return tmp_path / "zoo"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: (exit code, stdout, stderr)."""
    from hf_epimer.cli.main import main

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def clip_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full CLIP that reads every letter, and `ab` as one word, so that no two classes are alike to it. Read only."""
    folder = tmp_path_factory.mktemp("base")
    letters = string.ascii_letters + string.digits + string.punctuation
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    return write_clip(folder, tokens, [("a", "b</w>")], 64)


@pytest.fixture(scope="session")
def clip_zoo(clip_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, two fine-tuned towers a/ and b/ without statistics, data/ and task files a.yaml and b.yaml. Read only."""
    folder = tmp_path_factory.mktemp("zoo")
    shutil.copytree(clip_base, folder / "base")
    for index, name in enumerate("ab", start=1):
        write_tuned(folder / name, clip_base, seed=index)
        write_data(folder / "data" / name, seed=index)
        task = {"name": name, "dataset": f"data/{name}", "templates": ["{} b.", "a {}"]}
        (folder / f"{name}.json").write_text(json.dumps(task))
    return folder


@pytest.fixture(scope="session")
def space_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF_HOME with a demo zoo at its smallest, for the page. Read only."""
    from hf_epimer.demo.zoo import ZooSize, make_zoo

    home = tmp_path_factory.mktemp("space") / "home"
    size = ZooSize(
        captioned=60, pretrain_steps=2, pretrain_batch=16, train=200, test=40, tune_steps=2, tune_batch=8, fisher=2
    )
    make_zoo(home / "hf-epimer" / "demo-zoo-1", size=size)
    return home


@pytest.fixture(scope="session")
def page_at_home(space_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpaceApp]:
    """The page on a machine of one's own, offline, with the demo zoo."""
    with SpaceApp(space_home, tmp_path_factory.mktemp("at-home"), "http://127.0.0.1:1", HF_HUB_OFFLINE="1") as app:
        yield app
    assert app.process.returncode == 0
    assert not list(app.temp.glob("hf-epimer-web-*"))  # closed, it leaves nothing


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the package keeps in an HF_HOME of this test alone; the working folder is tmp_path."""
    remove_spare()  # where another test kept what it could not keep below HF_HOME
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / "hf-epimer"


@pytest.fixture
def own_cache(own_home: Path) -> Path:
    """The statistics kept there."""
    return own_home / "statistics"


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A Hub to which the client of this process talks as ann, who may write to org; the working folder is tmp_path."""
    with StandInHub() as stand_in:
        stand_in.add_user(WRITER, "ann", orgs=["org"])
        template = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        forget = "close_session" if hasattr(utils, "close_session") else "reset_sessions"  # before huggingface_hub 1.0
        getattr(utils, forget)()  # a session that was opened offline would stay so
        for module in (constants, file_download):  # older releases of huggingface_hub copy it there
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setattr(retry, "BACKOFF", (0.01, 0.02))
        monkeypatch.chdir(tmp_path)
        yield stand_in
        for thread in threading.enumerate():  # downloads that a failed command left under way
            if thread.name.startswith("fetch"):
                thread.join(20)


@pytest.fixture
def benchmark_hub(empty_hub: StandInHub, tmp_path: Path, clip_zoo: Path) -> StandInHub:
    """A Hub with org/base, two checkpoints without statistics, and small data sets of their benchmarks' schema."""
    empty_hub.add_user("hf_reader_secret", "ann", role="read", orgs=["org"])
    empty_hub.add_repo("org/base", clip_zoo / "base")
    for folder, name in (("a", "dtd"), ("b", "svhn")):
        shutil.copytree(clip_zoo / folder, tmp_path / "src" / folder)
        (tmp_path / "src" / folder / "README.md").write_text("---\nbase_model: org/base\n---\n\n# A model\n")
        empty_hub.add_repo(f"org/vit-b32-{name}", tmp_path / "src" / folder)
        task = benchmark_tasks()[name]
        empty_hub.add_repo(task.dataset, write_benchmark(tmp_path / "src" / name, task), repo_type="dataset")
    return empty_hub
