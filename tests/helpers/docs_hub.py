"""The repos that README.md and docs/ name, as small as they can be, on a stand-in Hub."""

from __future__ import annotations

import shutil
import string
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from helpers.adapters import make, rewrite_config
from helpers.data import write_benchmark
from helpers.hub_server import StandInHub
from hf_epimer.models.clip import CLIP
from hf_epimer.models.loading import load_tower, processor_class
from hf_epimer.tasks.task import benchmark_tasks

BASE = "openai/clip-vit-base-patch32"
TASKS = ("dtd", "svhn")


def fill(hub: StandInHub, folder: Path) -> None:
    """A base that can read, two fine-tuned towers, two adapters, and the data sets of their tasks."""
    base = write_base(folder / "base")
    hub.add_repo(BASE, base)
    tower = load_tower(base)
    weights = {f"vision_model.{name}": value for name, value in tower.state_dict().items()}
    for seed, name in enumerate(TASKS, start=1):
        task = benchmark_tasks()[name]
        hub.add_repo(task.dataset, write_benchmark(folder / "data" / name, task, rows=60), repo_type="dataset")
        card = f"---\nbase_model: {BASE}\ndatasets:\n- {task.dataset}\n---\n"
        generator = torch.Generator().manual_seed(seed)
        tuned = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
        tower.config.save_pretrained(folder / name)
        save_file(tuned, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "README.md").write_text(card)
        hub.add_repo(f"org/vit-b32-{name}", folder / name)
        adapter = make(base, f"lora-{name}", seed)
        rewrite_config(adapter, base_model_name_or_path=BASE)
        (adapter / "README.md").write_text(card)
        hub.add_repo(f"org/lora-{name}", adapter)
    shutil.rmtree(folder)


def write_base(folder: Path) -> Path:
    """A random CLIP whose tokenizer knows every letter, so that no two classes have the same embedding."""
    letters = string.ascii_letters + string.digits + string.punctuation
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    start, end = len(words) - 2, len(words) - 1
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    special = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    size = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 10}
    text = size | special | {"vocab_size": len(words), "hidden_size": 12, "max_position_embeddings": 77}
    vision = size | {"hidden_size": 16, "image_size": 8, "patch_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10))
        for parameter in model.parameters():  # the initial weights are so small that all classes look alike
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor_class(CLIP)(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder
