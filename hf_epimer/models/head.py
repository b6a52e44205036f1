"""The head of a task, made once: from the base's text tower, or from the file that the task names.

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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from hf_epimer.checkpoints.atomic import atomic_file
from hf_epimer.checkpoints.cache import cached_path, keep
from hf_epimer.errors import StatisticsError, TaskError
from hf_epimer.models.architecture import ZeroShot
from hf_epimer.models.classifier import Classifier, Head, LinearHead, ZeroShotHead
from hf_epimer.models.loading import load_full, load_processor
from hf_epimer.models.source import ModelSource
from hf_epimer.tasks.task import Task


def classifier_for(tower: nn.Module, base: ModelSource, task: Task, class_names: Sequence[str]) -> Classifier:
    """A tower behind the head of a task, ready to be evaluated.

    Args:
        tower: shared, not copied.
        class_names: in the order of the labels.

    Raises:
        StatisticsError, TaskError, CheckpointError: as in `load_head`.
    """
    head = load_head(base, task, class_names)
    return Classifier(tower, base.architecture, head, load_processor(base.folder_with_processor())).eval()


def load_head(base: ModelSource, task: Task, class_names: Sequence[str]) -> Head:
    """The head of a task, out of the cache, or made and kept there.

    Raises:
        StatisticsError: as in `check_head`.
        TaskError: the task's own head does not fit.
        CheckpointError: the base cannot be read.
    """
    check_head(base, task)
    given = _read_head(task, class_names) if task.head else None
    if base.architecture.zero_shot is None:
        assert given is not None
        return LinearHead(*_of_width(given, base, task))
    parts = base_parts(base, task, class_names)
    return ZeroShotHead(parts["projection"], given[0] if given else parts["head"], parts["logit_scale"])


def check_head(base: ModelSource, task: Task) -> None:
    """Refuse what cannot work before anything is downloaded.

    Raises:
        StatisticsError: there is nothing to classify with: a text tower, its projection, or the task's own head.
    """
    if not can_classify(base, task):
        zero_shot = base.architecture.zero_shot
        remedy = (
            f"name a full model ({zero_shot.model_class}) with --base"
            if zero_shot
            else "give the task a head of its own (head: FILE, with a weight [classes, width] and a bias [classes])"
        )
        raise StatisticsError(
            f"{base}: it has no text tower and no projection to classify {task.name!r} with: {remedy}"
        )


def can_classify(base: ModelSource, task: Task) -> bool:
    """Whether images of a task can be classified behind this base: it makes heads, or takes the task's own."""
    return base.has_text_tower or (task.head is not None and base.architecture.zero_shot is None)


# --- from texts -----------------------------------------------------------------------------------------------------


def base_parts(base: ModelSource, task: Task, class_names: Sequence[str]) -> dict[str, Tensor]:
    """What a zero-shot head takes from its base, out of the cache, or made and kept there.

    Returns:
        `projection` [d, w], `logit_scale` [] and, unless the task has its own, `head` [classes, d].
    """
    path = _cached(base, task, class_names)
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        pass  # not there yet, or damaged: it is made again
    folder = base.folder_with_tokenizer()
    model, zero_shot = load_full(folder)
    parts = {
        "projection": model.get_parameter(zero_shot.projection).detach(),
        "logit_scale": model.get_parameter(zero_shot.logit_scale).detach(),
    }
    if not task.head:
        from transformers import AutoTokenizer

        parts["head"] = text_head(model, zero_shot, AutoTokenizer.from_pretrained(folder), class_names, task.templates)

    def write(path: Path) -> None:
        with atomic_file(path) as unfinished:
            save_file({name: tensor.contiguous() for name, tensor in parts.items()}, unfinished)

    keep(path, write)
    return parts


def _cached(base: ModelSource, task: Task, class_names: Sequence[str]) -> Path:
    prompts = None if task.head else [list(class_names), list(task.templates)]
    identity = hashlib.sha256(json.dumps([base.content_sha, prompts]).encode()).hexdigest()[:24]
    return cached_path("heads", f"{task.file_name}-{identity}.safetensors")


@torch.no_grad()
def text_head(
    model: nn.Module, zero_shot: ZeroShot, tokenizer: Any, class_names: Iterable[str], templates: Sequence[str]
) -> Tensor:
    """One unit row per class: [classes, d]."""
    device = next(model.parameters()).device
    rows = []
    for name in class_names:
        prompts = [template.replace("{}", name) for template in templates]
        tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(device)
        rows.append(normalize(normalize(zero_shot.embed(model, tokens), dim=-1).mean(0), dim=-1))
    return torch.stack(rows)


# --- from a file ----------------------------------------------------------------------------------------------------


def _read_head(task: Task, class_names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The head that a task names: weight [classes, d] and bias [classes], zero where the file has none."""
    try:
        tensors = load_file(str(task.head))
    except (OSError, SafetensorError) as error:
        raise TaskError(f"{task.head}: cannot be read as the head of a task: {error}") from error
    if "weight" not in tensors or tensors["weight"].ndim != 2:
        raise TaskError(f"{task.head}: a head is a tensor 'weight' [classes, projection_dim]; found {sorted(tensors)}")
    weight = tensors["weight"].float()
    if len(weight) != len(class_names):
        raise TaskError(f"{task.head}: {len(weight)} rows for the {len(class_names)} classes of {task.name!r}")
    bias = tensors.get("bias", weight.new_zeros(len(weight))).float()
    if bias.shape != weight.shape[:1]:
        raise TaskError(f"{task.head}: 'bias' has shape {list(bias.shape)}, not [{len(weight)}]")
    return weight, bias


def _of_width(head: tuple[Tensor, Tensor], base: ModelSource, task: Task) -> tuple[Tensor, Tensor]:
    width = base.vision_config[base.architecture.width]
    if head[0].shape[1] != width:
        raise TaskError(f"{task.head}: its rows have {head[0].shape[1]} numbers, the features of {base} {width}")
    return head
