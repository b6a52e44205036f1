"""The repos that README.md and docs/ name, as small as they can be, on a stand-in Hub."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

from helpers.adapters import make, rewrite_config
from helpers.clip import write_clip, write_tuned
from helpers.data import write_benchmark
from helpers.hub_server import StandInHub
from helpers.open_clip import write_open_clip
from helpers.shards import language_model, write_shards
from hf_epimer.tasks.task import benchmark_tasks

BASE = "openai/clip-vit-base-patch32"
TASKS = ("dtd", "svhn")


def fill(hub: StandInHub, folder: Path) -> None:
    """A base that can read, two fine-tuned towers, two adapters, their data sets; language models and UNets."""
    base = write_base(folder / "base")
    hub.add_repo(BASE, base)
    hub.add_repo("org/open-clip-b32", write_open_clip(folder / "open-clip", base))
    for seed, name in enumerate(TASKS, start=1):
        task = benchmark_tasks()[name]
        hub.add_repo(task.dataset, write_benchmark(folder / "data" / name, task, rows=60), repo_type="dataset")
        card = f"---\nbase_model: {BASE}\ndatasets:\n- {task.dataset}\n---\n"
        write_tuned(folder / name, base, seed)
        (folder / name / "README.md").write_text(card)
        hub.add_repo(f"org/vit-b32-{name}", folder / name)
        adapter = make(base, f"lora-{name}", seed)
        rewrite_config(adapter, base_model_name_or_path=BASE)
        (adapter / "README.md").write_text(card)
        hub.add_repo(f"org/lora-{name}", adapter)
    tensors = language_model(0)
    hub.add_repo("org/lm", write_shards(folder / "lm", tensors))
    for seed, name in enumerate(("lm-code", "lm-chat"), start=1):
        write_shards(folder / name, language_model(seed, tensors))
        (folder / name / "README.md").write_text("---\nbase_model: org/lm\n---\n")
        hub.add_repo(f"org/{name}", folder / name)
    unets = {"sd": tensors, "sd-cats": language_model(3, tensors), "sd-dogs": language_model(4, tensors)}
    for name, unet in unets.items():
        write_shards(folder / name / "unet", unet)
        (folder / name / "README.md").write_text("---\nbase_model: org/sd\n---\n")
        hub.add_repo(f"org/{name}", folder / name)
    shutil.rmtree(folder)


def write_base(folder: Path) -> Path:
    """A random CLIP whose tokenizer knows every letter, so that no two classes have the same embedding."""
    letters = sorted(ByteLevel.alphabet())  # of any script, byte by byte
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return write_clip(folder, words, [], 77)
