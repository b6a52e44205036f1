"""What all tests share: a tiny CLIP vision tower as tensors and as folders, and a Hub that is nowhere to be reached."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# before torch and huggingface_hub are imported: no network, no spinning threads, plain HTTP uploads
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-epimer-tests-")  # also for the processes that tests start
os.environ.pop("HF_TOKEN", None)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hub_server import StandInHub
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from space_app import SpaceApp
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from hf_epimer.hub import source as hub
from hf_epimer.models.clip import CLIP_VISION
from hf_epimer.models.loading import ImageProcessor, load_vision
from hf_epimer.tasks.task import Task

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": 16,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

StateDict = dict[str, Tensor]


def tiny_state(seed: int, like: StateDict | None = None, scale: float = 0.1) -> StateDict:
    """A random tower; with `like`, a fine-tuned version of it."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in CLIP_VISION.shapes(TINY).items()}
    return state if like is None else {name: like[name] + scale * value.to(like[name]) for name, value in state.items()}


def tiny_fisher(seed: int) -> StateDict:
    """Positive values over several orders of magnitude, as Fisher diagonals are."""
    return {name: (2 * value).exp() * 1e-7 for name, value in tiny_state(seed).items()}


def write_checkpoint(
    folder: Path,
    state: StateDict,
    *,
    config: dict[str, object] | None = None,
    fisher: StateDict | None = None,
    card: str | None = None,
) -> Path:
    """A CLIPVisionModel folder as it would lie on the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "projection_dim": 24, **TINY}
    (folder / "config.json").write_text(json.dumps({**content, **(config or {})}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if fisher is not None:
        save_file(fisher, folder / "fisher.safetensors", metadata={"format": "hf-epimer.fisher/1"})
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


@pytest.fixture
def base_state() -> StateDict:
    return tiny_state(0)


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
    """A CLIP with two small towers of unlike widths and random weights."""
    folder = tmp_path_factory.mktemp("base")
    tokens = ["a", "b", ".", "a</w>", "b</w>", ".</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[("a", "b</w>")], model_max_length=8)
    special = {"bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 8}
    size = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 10}
    text = size | special | {"vocab_size": len(tokens), "hidden_size": 12, "max_position_embeddings": 8}
    vision = size | {"hidden_size": 16, "image_size": 8, "patch_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10))
        for parameter in model.parameters():  # the initial weights are so small that all classes look alike
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = ImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor.save_pretrained(folder)
    return folder


CLASSES = ("a", "b", "ab")


def write_data(folder: Path, rows: int = 40, seed: int = 0, names: tuple[str, ...] = CLASSES) -> Path:
    """A data set in parquet as on the Hub: noise whose brightness gives the class away, `train` and `test`."""
    rng = np.random.default_rng(seed)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    for split in ("train", "test"):
        labels = rng.integers(0, len(names), rows).tolist()
        noise = [rng.integers(0, 120, (9, 8, 3)) + 120 * label // len(names) for label in labels]
        images = [Image.fromarray(pixels.astype(np.uint8)) for pixels in noise]
        data = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def write_benchmark(folder: Path, task: Task, rows: int = 12) -> Path:
    """A data set of a benchmark's schema: splits, columns, config and number of classes, with noise for pictures."""
    names = tuple(f"class {index}" for index in range(len(task.class_names or ())))
    write_data(folder, rows, names=names)
    splits = {"train": task.train_split, "test": task.test_split}
    where = task.config or "data"
    (folder / where).mkdir(exist_ok=True)
    listed = ""
    for written, split in splits.items():
        file = folder / "data" / f"{written}-00000-of-00001.parquet"
        data = datasets.Dataset.from_parquet(str(file), cache_dir=str(folder / ".cache"))
        columns = {"image": task.image_column, "label": task.label_column}
        data = data.rename_columns({old: new for old, new in columns.items() if old != new})
        file.unlink()
        data.to_parquet(folder / where / f"{split}-00000-of-00001.parquet")
        listed += f"  - split: {split}\n    path: {where}/{split}-*\n"
    shutil.rmtree(folder / ".cache")
    config = task.config or "default"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{listed}---\n")
    return folder


@pytest.fixture(scope="session")
def clip_zoo(clip_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, two fine-tuned towers a/ and b/ without statistics, data/ and task files a.yaml and b.yaml. Read only."""
    folder = tmp_path_factory.mktemp("zoo")
    shutil.copytree(clip_base, folder / "base")
    original = load_vision(clip_base)
    prefixed = {f"vision_model.{name}": value for name, value in original.state_dict().items()}
    for index, name in enumerate("ab", start=1):
        generator = torch.Generator().manual_seed(index)
        tuned = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in prefixed.items()}
        (folder / name).mkdir()
        original.config.save_pretrained(folder / name)
        save_file(tuned, folder / name / "model.safetensors", metadata={"format": "pt"})
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


WRITER = "hf_writer_secret"


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A Hub to which the client of this process talks as ann, who may write to org; the working folder is tmp_path."""
    with StandInHub() as stand_in:
        stand_in.add_user(WRITER, "ann", orgs=["org"])
        template = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setattr(hub, "BACKOFF", (0.01, 0.02))
        monkeypatch.chdir(tmp_path)
        yield stand_in
