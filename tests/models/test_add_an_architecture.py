"""docs/add-an-architecture.md at its word: its file, its line in the table, its commands."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTMSNConfig, ViTMSNModel

from helpers.classifiers import load_classifier
from helpers.command import Run
from helpers.data import CLASSES, write_data
from helpers.versions import needs_transformers
from hf_epimer import models
from hf_epimer.errors import StatisticsError, TaskError
from hf_epimer.models.architecture import Architecture
from hf_epimer.models.loading import processor_class
from hf_epimer.models.weights import blocks_of, parameter_names
from hf_epimer.tasks.task import Task, load_task_file

PAGE = Path(__file__).parents[2] / "docs" / "add-an-architecture.md"
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = ViTMSNConfig(**SIZE, image_size=8, patch_size=4)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Architecture:
    """The page's file, and its entry in the table."""
    (file,) = blocks("python")
    (tmp_path / "vit_msn.py").write_text(file)
    spec = importlib.util.spec_from_file_location("vit_msn_of_the_page", tmp_path / "vit_msn.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    needs_transformers(module.VIT_MSN.since, "the page's family")
    monkeypatch.setattr(models, "ARCHITECTURES", (*models.ARCHITECTURES, module.VIT_MSN))
    return module.VIT_MSN


@pytest.fixture
def zoo(family: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, a and b as transformers writes them, and a.yaml and b.yaml as on the page."""
    monkeypatch.chdir(tmp_path)
    (task,) = blocks("yaml")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTMSNModel(CONFIG)
        for name in ("base", "a", "b"):
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(name)
        for name in ("a", "b"):
            write_data(tmp_path / "data" / name)
            head = {"weight": torch.randn(len(CLASSES), 16), "bias": torch.randn(len(CLASSES))}
            save_file(head, f"head-{name}.safetensors")
            filled = task.replace("flowers-head", f"head-{name}").replace("org/flowers", f"data/{name}")
            Path(f"{name}.yaml").write_text(filled.replace("name: flowers", f"name: {name}"))
    processor_class(family)(size={"height": 8, "width": 8}).save_pretrained("base")
    return tmp_path


def test_the_commands_of_the_page_do_what_it_says(zoo: Path, family: Architecture, run: Run) -> None:
    first, *commands = blocks("bash")
    assert first.startswith("python -c") and len(commands) == 2
    for line in "".join(commands).splitlines():
        words = shlex.split(line)
        assert words.pop(0) == "hf-epimer"
        code, _, complaint = run(*words)
        assert code == 0, complaint
    expected = family.shapes(family.vision_config(CONFIG.to_dict(), "base"))
    assert {name: tuple(tensor.shape) for name, tensor in load_file("fisher.safetensors").items()} == expected
    for folder in ("merged", "calibrated"):
        _, report = ViTMSNModel.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
    assert load_file("merged/model.safetensors").keys() == expected.keys()
    totals = json.loads(Path("calibrated/merge_report.json").read_text())["totals"]
    assert totals["calibrated"] == CONFIG.num_hidden_layers * sum(len(residual.layers) for residual in family.residuals)
    card = Path("calibrated/README.md").read_text()
    assert "2 fine-tuned ViT-MSNs merged" in card and "ViTMSNModel.from_pretrained" in card
    assert "of the task's own head" in card and "type: image-classification" in card and "CLIP" not in card
    assert json.loads(Path("calibrated/results.json").read_text())["tasks"].keys() == {"a", "b"}


def test_a_linear_head_classifies_what_transformers_computes(zoo: Path) -> None:
    task = load_task_file("a.yaml")
    model = load_classifier(zoo / "a", zoo / "base", task, CLASSES)
    pixels = torch.randn(3, 3, 8, 8)
    head = load_file("head-a.safetensors")
    with torch.no_grad():
        tower = ViTMSNModel.from_pretrained("a").eval()
        expected = tower(pixels).last_hidden_state[:, 0] @ head["weight"].T + head["bias"]
        torch.testing.assert_close(model(pixels), expected)
    save_file({"weight": torch.ones(3, 15)}, "head-a.safetensors")
    with pytest.raises(TaskError, match=r"rows have 15 numbers, the features of .* 16"):
        load_classifier(zoo / "a", zoo / "base", task, CLASSES)
    with pytest.raises(StatisticsError, match="give the task a head of its own"):
        load_classifier(zoo / "a", zoo / "base", Task("plain", "org/plain", templates=("{}",)), CLASSES)


def test_names_in_memory_lead_to_names_in_files_and_back(zoo: Path, family: Architecture) -> None:
    stored = load_file("base/model.safetensors")
    tower = ViTMSNModel.from_pretrained("base")
    names = parameter_names(tower, family)
    assert set(names.values()) == stored.keys()
    assert all(torch.equal(tower.get_parameter(name), stored[canonical]) for name, canonical in names.items())
    assert {family.module_name(canonical) for canonical in stored} == names.keys()
    assert [block.module for block in blocks_of(tower, family)] == list(tower.layers)
