"""Builds the demonstration zoo: a tiny CLIP base, four drawn data sets, and one fine-tuned vision tower for each.

The base is a CLIP of 0.75 million parameters trained from nothing on easy, captioned drawings with the symmetric
contrastive loss. For unit image rows U, unit caption rows V (both [batch, d]) and s = exp(logit_scale),

    loss = (CE(s U V^T, E) + CE(s V U^T, E)) / 2        E_ij = 1/m_i if captions i and j are equal, else 0

where m_i counts the captions equal to caption i: equal captions in one batch must not be pushed apart. Each tower is
then tuned in full, by cross-entropy through the frozen zero-shot head, on a harder version of one drawn family.

Layout: root/base and root/<task> (models), root/datasets/<task> (parquet), root/tasks/<task>.yaml, root/zoo.json.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
import yaml
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from numpy.random import Generator
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from hf_epimer.curvature.data_pass import estimate_fisher
from hf_epimer.curvature.files import StatisticsMetadata, save_statistics
from hf_epimer.demo.captions import FAMILIES, LONGEST_TEXT, all_texts, captioned_drawings, make_tokenizer
from hf_epimer.demo.drawings import DRAWINGS, KINDS, SIDE
from hf_epimer.errors import OutputError
from hf_epimer.hub.refs import ModelRef
from hf_epimer.methods.statistic import FISHER_FILE
from hf_epimer.models.classifier import Classifier
from hf_epimer.models.clip import CLIP
from hf_epimer.models.head import classifier_for
from hf_epimer.models.loading import load_tower, preprocess, processor_class
from hf_epimer.models.source import ModelSource, resolve_model
from hf_epimer.tasks.task import load_task_file

Progress = Callable[[str, float], None]
Report = Callable[[float], None]
Loss = Callable[[Tensor], Tensor]

WIDTH, LAYERS, PATCH, PROJECTION = 128, 4, 8, 64
OWNER = "hf-epimer-demo"


@dataclass(frozen=True)
class ZooSize:
    """How much is drawn and how long is trained; with the defaults two idle cores are busy for about two minutes."""

    captioned: int = 12_000
    pretrain_steps: int = 350
    pretrain_batch: int = 128
    train: int = 2_000
    test: int = 500
    tune_steps: int = 300
    tune_batch: int = 64
    fisher: int = 256


@dataclass(frozen=True)
class Base:
    """The base model with everything needed to classify through it."""

    model: CLIPModel
    tokenizer: CLIPTokenizer
    processor: Any


@dataclass(frozen=True)
class Split:
    """Pictures and labels, and the pictures as the tower sees them: pixels [n, 3, 32, 32], targets [n]."""

    images: list[Image.Image]
    labels: list[int]
    pixels: Tensor
    targets: Tensor


def make_zoo(root: Path, on_progress: Progress | None = None, seed: int = 0, size: ZooSize | None = None) -> Path:
    """The folder of the zoo, built if it is not there; it appears under its name only when it is complete."""
    root = Path(root)
    if (root / "zoo.json").is_file():
        return root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise OutputError(f"{root} exists and holds no zoo: name another folder, or remove it")
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _build(unfinished, seed, size or ZooSize(), on_progress or (lambda stage, fraction: None))
        unfinished.chmod(0o755)  # mkdtemp makes a folder for its owner's eyes only
        if not (root / "zoo.json").is_file():  # another process may have been faster
            unfinished.rename(root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def _build(root: Path, seed: int, size: ZooSize, on_progress: Progress) -> None:
    started = time.monotonic()
    _write_base(root / "base", _pretrain(np.random.default_rng([seed, 0]), size, partial(on_progress, "base")))
    base = resolve_model(ModelRef(str(root / "base")))
    tasks = {}
    for number, name in enumerate(FAMILIES, start=1):
        rng = np.random.default_rng([seed, number])
        tasks[name] = _add_task(root, name, base, rng, seed, size, partial(on_progress, name))
    summary = {"base": "base", "tasks": tasks, "seed": seed, "size": asdict(size)}
    summary["seconds"] = round(time.monotonic() - started, 1)
    (root / "zoo.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _add_task(
    root: Path, name: str, base: ModelSource, rng: Generator, seed: int, size: ZooSize, report: Report
) -> dict[str, Any]:
    """Draw a task's data, tune a tower on it, and write the data set, the task file, the model and its Fisher."""
    _write_task_file(root / "tasks" / f"{name}.yaml", name)
    task = load_task_file(root / "tasks" / f"{name}.yaml")
    model = classifier_for(load_tower(root / "base"), base, base, task, KINDS[name])
    train, test = (_draw_split(name, count, model.processor, rng) for count in (size.train, size.test))
    zero_shot = _accuracy(model, test)
    _tune(model, train, size, report)
    fine_tuned = _accuracy(model, test)
    _write_dataset(root / "datasets" / name, name, {"train": train, "test": test})
    _write_tower(root / name, name, model, fine_tuned)
    count = min(size.fisher, size.train)
    batches = list(zip(train.pixels[:count].split(size.tune_batch), train.targets[:count].split(size.tune_batch)))
    origin = StatisticsMetadata(count, name, f"{OWNER}/{name}", "", f"{OWNER}/{name}", "", "true", seed)
    save_statistics(root / name / FISHER_FILE.name, estimate_fisher(model, batches), origin)
    return {"zero_shot": zero_shot, "fine_tuned": fine_tuned, "samples": size.test}


def _draw_split(name: str, count: int, processor: Any, rng: Generator) -> Split:
    """Equally many drawings of every kind, in random order, from fairly easy up to the family's difficulty."""
    hardest = FAMILIES[name].difficulty
    labels = rng.permutation(np.arange(count) % len(KINDS[name])).tolist()
    images = [DRAWINGS[name](KINDS[name][label], rng, rng.uniform(0.4 * hardest, hardest)) for label in labels]
    return Split(images, labels, preprocess(processor, images), torch.tensor(labels))


# ---- training -----------------------------------------------------------------------------------------------------


def _pretrain(rng: Generator, size: ZooSize, report: Report) -> Base:
    """Train the base on captioned drawings. Every caption is tokenised once; batches refer to captions by number."""
    images, captions = captioned_drawings(size.captioned, rng)
    texts, numbers = np.unique(captions, return_inverse=True)
    tokenizer = make_tokenizer(all_texts())
    processor = processor_class(CLIP)(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    model = CLIPModel(_config(tokenizer)).train()
    pixels, caption_of = preprocess(processor, images), torch.from_numpy(numbers)
    tokens = tokenizer(list(texts), padding=True, return_tensors="pt")["input_ids"]

    def contrastive(batch: Tensor) -> Tensor:
        used, place = torch.unique(caption_of[batch], return_inverse=True)
        seen = model.visual_projection(model.vision_model(pixel_values=pixels[batch]).pooler_output)
        read = model.text_projection(model.text_model(input_ids=tokens[used]).pooler_output)
        logits = model.logit_scale.exp() * normalize(seen, dim=-1) @ normalize(read, dim=-1)[place].T
        equal = (place[:, None] == place).float()
        equal = equal / equal.sum(1, keepdim=True)
        return (cross_entropy(logits, equal) + cross_entropy(logits.T, equal)) / 2

    _descend(model, contrastive, len(images), size.pretrain_steps, size.pretrain_batch, 1e-3, report)
    return Base(model.eval(), tokenizer, processor)


def _tune(model: Classifier, train: Split, size: ZooSize, report: Report) -> None:
    """Tune the tower on its task; shifted and unevenly lit copies of the pictures keep it from learning by heart."""

    def supervised(batch: Tensor) -> Tensor:
        down, right = torch.randint(-2, 3, (2,)).tolist()
        light = 1 + 0.15 * (2 * torch.rand(len(batch), 1, 1, 1) - 1)
        pixels = light * torch.roll(train.pixels[batch], (down, right), dims=(2, 3))
        return cross_entropy(model(pixels), train.targets[batch])

    _descend(model.tower, supervised, len(train.labels), size.tune_steps, size.tune_batch, 5e-4, report)


def _descend(
    model: nn.Module, loss_of: Loss, samples: int, steps: int, batch: int, rate: float, report: Report
) -> None:
    """AdamW with a one-cycle learning rate; each epoch passes over the samples in a new random order."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    epochs = steps * batch // samples + 1
    order = torch.cat([torch.randperm(samples) for _ in range(epochs)])
    for step in range(steps):
        loss = loss_of(order[step * batch : (step + 1) * batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        report((step + 1) / steps)


def _accuracy(model: Classifier, split: Split) -> float:
    return (model.top1(split.pixels) == split.targets).double().mean().item()


def _config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 3, "max_position_embeddings": LONGEST_TEXT, "projection_dim": PROJECTION}
    vision = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    vision |= {"num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH, "projection_dim": PROJECTION}
    return CLIPConfig(text_config=text | special, vision_config=vision, projection_dim=PROJECTION)


# ---- files ----------------------------------------------------------------------------------------------------------


def _write_base(folder: Path, base: Base) -> None:
    _write_weights(folder, base.model.config, "CLIPModel", base.model.state_dict())
    base.tokenizer.save_pretrained(folder)
    base.processor.save_pretrained(folder)
    body = "# Demonstration base\n\nA tiny CLIP trained on easy, captioned drawings."
    _write_card(folder, ModelCardData(license="apache-2.0", library_name="transformers", tags=["clip"]), body)


def _write_tower(folder: Path, name: str, model: Classifier, fine_tuned: float) -> None:
    """A vision tower as published: the names on disk carry the prefix, which every release of transformers reads."""
    _write_weights(folder, model.tower.config, "CLIPVisionModel", model.tower_parameters())
    model.processor.save_pretrained(folder)
    title = FAMILIES[name].title
    result = EvalResult("image-classification", f"{OWNER}/{name}", title, "accuracy", round(fine_tuned, 4))
    card = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        datasets=[f"{OWNER}/{name}"],
        tags=["clip", "vision"],
        model_name=name,
        eval_results=[result],
    )
    body = f"# {name}\n\nThe demonstration base, tuned on: {title.lower()}. Test accuracy {fine_tuned:.3f}."
    _write_card(folder, card, body)


def _write_weights(folder: Path, config: Any, architecture: str, tensors: Mapping[str, Tensor]) -> None:
    """Configuration and fp32 tensors, written directly: save_pretrained renames tensors and shows a progress bar."""
    config.architectures = [architecture]
    config.save_pretrained(folder)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def _write_dataset(folder: Path, name: str, splits: dict[str, Split]) -> None:
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(KINDS[name]))})
    (folder / "data").mkdir(parents=True)
    for split, drawn in splits.items():
        data = Dataset.from_dict({"image": drawn.images, "label": drawn.labels}, features=features)
        # Written as a table rather than with to_parquet, which would show its own progress bar.
        pyarrow.parquet.write_table(data.data.table, folder / "data" / f"{split}-00000-of-00001.parquet")
    title, kind = FAMILIES[name].title, "image-classification"
    card = DatasetCardData(license="apache-2.0", pretty_name=title, task_categories=[kind])
    body = f"# {name}\n\n{title}: drawings of {SIDE} x {SIDE} pixels in {len(KINDS[name])} classes."
    _write_card(folder, card, body)


def _write_task_file(path: Path, name: str) -> None:
    path.parent.mkdir(exist_ok=True)
    task = {"name": name, "dataset": f"../datasets/{name}", "class_names": list(KINDS[name])}
    task["templates"] = list(FAMILIES[name].templates)
    path.write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def _write_card(folder: Path, metadata: ModelCardData | DatasetCardData, body: str) -> None:
    (folder / "README.md").write_text(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n", encoding="utf-8")
