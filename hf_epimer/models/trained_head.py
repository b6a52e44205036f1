"""The classifier that a model was trained with: among its weights, or beside a merge of such models, one for each task.

    heads/LABEL.safetensors     weight [classes, d], bias [classes]; its header names the task and the classes

It is no part of what is merged, for no two tasks have the same classes. An adapter has it among its `modules_to_save`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hf_epimer.checkpoints.reader import Checkpoint
from hf_epimer.errors import CheckpointError, TaskError
from hf_epimer.lora.peft_keys import plain_keys
from hf_epimer.merging.finite import check_weights
from hf_epimer.models.architecture import Architecture
from hf_epimer.models.source import HEADS, ModelSource
from hf_epimer.tasks.task import Task, plain_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedHead:
    """A linear layer that tells classes apart.

    Attributes:
        weight, bias: [classes, d] and [classes], as they are stored.
        class_names: in the order of the rows; empty where nobody has named them.
        task: its name; empty where it is not known.
        where: how messages name it.
    """

    weight: Tensor
    bias: Tensor
    class_names: tuple[str, ...]
    task: str
    where: str

    def in_order_of(self, class_names: Sequence[str], task: Task) -> tuple[Tensor, Tensor]:
        """Weight and bias in float32, their rows in the order of the task's labels.

        Raises:
            TaskError: it tells another number of classes apart.
        """
        if len(self.weight) != len(class_names):
            raise TaskError(
                f"{self.where}: its classifier tells {len(self.weight)} classes apart, and task {task.name!r} has "
                f"{len(class_names)}"
            )
        rows = {plain_name(name): row for row, name in enumerate(self.class_names)}
        wanted = [plain_name(name) for name in class_names]
        order = list(range(len(wanted)))
        if rows.keys() == set(wanted) and len(rows) == len(wanted):
            order = [rows[name] for name in wanted]
        elif self.class_names:
            logger.warning(
                "task %r: its first class is called %r, in the classifier that was trained for it %r: the classes are "
                "taken in the order in which they stand", task.name, class_names[0], self.class_names[0],
            )  # fmt: skip
        return self.weight[order].float(), self.bias[order].float()


def is_classifier(model: ModelSource, architecture: Architecture) -> bool:
    """Whether a model has a classifier among its weights, by its config.

    Args:
        architecture: of the model; of its base, if it is an adapter.
    """
    if model.is_adapter:
        kind = architecture.classification
        return kind is not None and kind.layer in (model.config.get("modules_to_save") or [])
    # transformers writes no `id2label` where there are two classes without names
    return model.is_classification_class and model.config.get("id2label") != {}


def has_head(model: ModelSource, architecture: Architecture, task: Task) -> bool:
    """Whether a model brings a classifier for a task."""
    return is_classifier(model, architecture) or _file_for(model, task) is not None


def trained_head(model: ModelSource, architecture: Architecture, task: Task) -> TrainedHead | None:
    """The classifier that a model brings for a task, fetched; None where it brings none.

    Raises:
        CheckpointError: there should be one, and it cannot be read.
    """
    if name := _file_for(model, task):
        return _from_file(model, name)
    return _from_weights(model, architecture, task.name) if is_classifier(model, architecture) else None


def heads_of(model: ModelSource, architecture: Architecture, task: Task | None) -> dict[str, TrainedHead]:
    """All classifiers that a model brings, by the labels under which a merge keeps them.

    Args:
        task: that it was tuned on.

    Raises:
        CheckpointError: as in `trained_head`.
    """
    if is_classifier(model, architecture):
        return {model.label: _from_weights(model, architecture, task.name if task else "")}
    return {PurePosixPath(name).stem: _from_file(model, name) for name in model.head_files}


def write_heads(folder: Path, heads: Mapping[str, TrainedHead]) -> None:
    """Write `heads/LABEL.safetensors` for every label."""
    for label, head in heads.items():
        file = folder / HEADS / f"{label}.safetensors"
        file.parent.mkdir(exist_ok=True)
        header = {"format": "pt", "task": head.task, "class_names": json.dumps(head.class_names, ensure_ascii=False)}
        save_file({"weight": head.weight.contiguous(), "bias": head.bias.contiguous()}, file, header)


def _file_for(model: ModelSource, task: Task) -> str | None:
    """The file beside a merge with the classifier of a task: by its name, else by its header."""
    named = f"{HEADS}/{task.name}.safetensors"
    if named in model.head_files:
        return named
    return next((name for name in model.head_files if _from_file(model, name).task == task.name), None)


def _from_file(model: ModelSource, name: str) -> TrainedHead:
    stored = Checkpoint(f"{model} ({name})", [model.fetch(name)])
    try:
        names = tuple(map(str, json.loads(stored.metadata.get("class_names", "[]"))))
    except (ValueError, TypeError):
        names = ()
    return _head(stored, {name: name for name in stored.shapes}, names, stored.metadata.get("task", ""))


def _from_weights(model: ModelSource, architecture: Architecture, task: str) -> TrainedHead:
    assert architecture.classification
    files = [model.fetch(name) for name in model.weight_files if name.endswith(".safetensors")]
    stored = Checkpoint(str(model), files)
    plain = plain_keys(stored.shapes, str(model)) if model.is_adapter else {name: name for name in stored.shapes}
    layer = f"{architecture.classification.layer}."
    unwrapped = {architecture.unwrapped(name): key for name, key in plain.items()}
    keys = {name.removeprefix(layer): key for name, key in unwrapped.items() if name.startswith(layer)}
    return _head(stored, keys, _class_names(model.config), task)


def _head(stored: Checkpoint, keys: Mapping[str, str], class_names: tuple[str, ...], task: str) -> TrainedHead:
    """A head from the tensors `weight` and `bias`, wherever they are stored.

    Raises:
        CheckpointError: there is no such layer, or it is damaged.
    """
    weight = stored.tensor(keys["weight"]) if "weight" in keys else None
    if weight is None or weight.ndim != 2:
        raise CheckpointError(f"{stored.label}: its config says that it is a classifier, and it has no linear layer")
    bias = stored.tensor(keys["bias"]) if "bias" in keys else weight.new_zeros(len(weight))
    if bias.shape != weight.shape[:1]:
        raise CheckpointError(
            f"{stored.label}: the bias of its classifier has shape {list(bias.shape)}, not [{len(weight)}]"
        )
    for name, values in (("weight", weight), ("bias", bias)):
        check_weights(values, stored.label, f"{name} of its classifier")
    return TrainedHead(weight, bias, class_names, task, stored.label)


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a model's classes, as far as it has given them any: transformers' own are LABEL_0, LABEL_1, ..."""
    names = config.get("id2label")
    if not isinstance(names, dict):
        return ()
    listed = tuple(str(names[str(number)]) for number in range(len(names)) if str(number) in names)
    is_default = listed == tuple(f"LABEL_{number}" for number in range(len(names)))
    return () if is_default or len(listed) != len(names) else listed
