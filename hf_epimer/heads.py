"""Everything of a base that a classifier needs beside the tower, cached: the zero-shot head is made once.

The text tower of a ViT-L/14 with eight benchmarks embeds some fifty thousand prompts; what comes out are a few numbers.
They are kept, with the projection and the logit scale, under the base's commit, the class names and the templates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from hf_epimer.classifier import (
    Classifier,
    load_adapted,
    load_base,
    load_processor,
    load_vision,
    own_head,
    text_head,
)
from hf_epimer.errors import StatisticsError
from hf_epimer.hub import Source
from hf_epimer.lora import is_adapter
from hf_epimer.resolving import base_folder, content_sha, has_text_tower, processor_folder
from hf_epimer.tasks import Task
from hf_epimer.writing import atomic_file


def load_tower(folder: str | Path, base: Source) -> nn.Module:
    """The vision tower of a checkpoint, or of a base with an adapter folded into it."""
    if is_adapter([path.name for path in Path(folder).iterdir()]):
        return load_adapted(folder, base_folder(base))
    return load_vision(folder)


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
