"""Everything of a base that a classifier needs beside the tower, cached: the zero-shot head is made once.

The text tower of a ViT-L/14 with eight benchmarks embeds some fifty thousand prompts; what comes out are a few numbers.
They are kept, with the projection and the logit scale, under the base's commit, the class names and the templates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel

from hf_epimer.checkpoints.atomic import atomic_file
from hf_epimer.errors import StatisticsError, TaskError
from hf_epimer.hub.source import Source
from hf_epimer.models.classifier import Classifier
from hf_epimer.models.files import base_folder, content_sha, has_text_tower, processor_folder
from hf_epimer.models.loading import load_base, load_processor
from hf_epimer.tasks.task import Task


def base_parts(base: Source, task: Task, class_names: Sequence[str]) -> dict[str, Tensor]:
    """What a classifier takes from its base, out of the cache, or made and kept there.

    Returns:
        `projection` [d, w], `logit_scale` [] and, unless the task has its own, `head` [classes, d].
    """
    check_head(base, task)
    path = _cached(base, task, class_names)
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        pass  # not there yet, or damaged: it is made again
    folder = base_folder(base)
    model = load_base(folder)
    parts = {"projection": model.visual_projection.weight.detach(), "logit_scale": model.logit_scale.detach()}
    if not task.head:
        parts["head"] = text_head(model, AutoTokenizer.from_pretrained(folder), class_names, task.templates)
    with atomic_file(path) as unfinished:
        save_file({name: tensor.contiguous() for name, tensor in parts.items()}, unfinished)
    return parts


def check_head(base: Source, task: Task) -> None:
    """Refuse what cannot work before anything is downloaded.

    Raises:
        StatisticsError: the base has no text tower and the task no head of its own, or no projection at all.
    """
    if not has_text_tower(base):
        raise StatisticsError(
            f"{base}: it has no text tower and no projection to classify {task.name!r} with: name a full CLIP model "
            "with --base"
        )


def _cached(base: Source, task: Task, class_names: Sequence[str]) -> Path:
    prompts = None if task.head else [list(class_names), list(task.templates)]
    identity = hashlib.sha256(json.dumps([content_sha(base), prompts]).encode()).hexdigest()[:24]
    return Path(constants.HF_HOME) / "hf-epimer" / "heads" / f"{task.name}-{identity}.safetensors"


def zero_shot_head(base_folder: str | Path, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One unit row per class from the base's text tower: [classes, projection_dim]."""
    return text_head(load_base(base_folder), AutoTokenizer.from_pretrained(base_folder), class_names, templates)


@torch.no_grad()
def text_head(base: CLIPModel, tokenizer: Any, class_names: Iterable[str], templates: Sequence[str]) -> Tensor:
    """The zero-shot head of a base model that is already in memory."""
    rows = []
    for name in class_names:
        prompts = [template.replace("{}", name) for template in templates]
        each = normalize(embed_texts(base, tokenizer, prompts), dim=-1)
        rows.append(normalize(each.mean(0), dim=-1))
    return torch.stack(rows)


def embed_texts(base: CLIPModel, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Projected text features, not normalised: [n, d]. (get_text_features returns another type in each release.)"""
    tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(base.device)
    return base.text_projection(base.text_model(**tokens).pooler_output)


def task_head(task: Task, base_folder: str | Path, class_names: Sequence[str]) -> Tensor:
    """The task's own head file if it has one, else the zero-shot head for these class names."""
    if task.head is None:
        return zero_shot_head(base_folder, class_names, task.templates)
    return own_head(task, class_names)


def own_head(task: Task, class_names: Sequence[str]) -> Tensor:
    """The head that the task names: [classes, projection_dim].

    Raises:
        TaskError: the file cannot be read, or does not fit.
    """
    assert task.head is not None
    head = _read_head(task.head)
    if len(head) != len(class_names):
        raise TaskError(f"{task.head}: {len(head)} rows for the {len(class_names)} classes of {task.name!r}")
    return head


def _read_head(path: str) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TaskError(f"{path}: cannot be read as the head of a task: {error}") from error
    if "weight" not in tensors or tensors["weight"].ndim != 2:
        raise TaskError(f"{path}: a head is a tensor 'weight' [classes, projection_dim]; found {sorted(tensors)}")
    return tensors["weight"].float()


def classifier_for(vision: nn.Module, base: Source, task: Task, class_names: Sequence[str]) -> Classifier:
    """A tower behind the base's head for a task.

    Args:
        vision: the tower; shared, not copied.
        class_names: in the order of the labels.

    Raises:
        StatisticsError: the base has no text tower and the task no head of its own.
        TaskError: the task's own head does not fit.
        CheckpointError: the base cannot be read.
    """
    parts = base_parts(base, task, class_names)
    head = own_head(task, class_names) if task.head else parts["head"]
    processor = load_processor(processor_folder(base))
    return Classifier(vision, parts["projection"], head, parts["logit_scale"], processor).eval()
