"""The head of a task: from the file that it names, the model's own training, else the base's text tower.

The text tower of a ViT-L/14 with eight benchmarks embeds some fifty thousand prompts; what comes out are a few numbers.
They are kept, with the projection and the logit scale, under the base's commit, the class names and the templates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from hf_epimer.checkpoints.atomic import atomic_file
from hf_epimer.checkpoints.cache import cached_path, keep
from hf_epimer.checkpoints.reader import check_whole, read_json
from hf_epimer.errors import CheckpointError, StatisticsError, TaskError
from hf_epimer.hub.refs import ModelRef
from hf_epimer.hub.words import one_line
from hf_epimer.merging.finite import check_weights, is_finite
from hf_epimer.models.architecture import ZeroShot
from hf_epimer.models.base import base_of
from hf_epimer.models.classifier import Classifier, Head, LinearHead, ZeroShotHead
from hf_epimer.models.loading import load_full, load_processor
from hf_epimer.models.source import PROCESSOR_FILES, ModelSource
from hf_epimer.models.trained_head import has_head, trained_head
from hf_epimer.tasks.task import Task


def classifier_for(
    tower: nn.Module, model: ModelSource, base: ModelSource, task: Task, class_names: Sequence[str]
) -> Classifier:
    """A tower behind the head of a task, ready to be evaluated.

    Args:
        tower: shared, not copied; it need not have the weights of the model.
        model: whose classifier it is, where it was trained with one.
        class_names: in the order of the labels.

    Raises:
        StatisticsError, TaskError, CheckpointError: as in `load_head`.
    """
    head = load_head(model, base, task, class_names)
    return Classifier(tower, base.architecture, head, load_processor(base.folder_with_processor())).eval()


def load_head(model: ModelSource, base: ModelSource, task: Task, class_names: Sequence[str]) -> Head:
    """The head of a task: its own, else the classifier that the model was trained with, else one made out of texts.

    The last is kept in the cache.

    Raises:
        StatisticsError: as in `check_head`.
        TaskError: a head does not fit the classes, or the tower.
        CheckpointError: the model or the base cannot be read.
    """
    check_head(model, base, task)
    trained = None if task.head else trained_head(model, base.architecture, task)
    if trained:
        weight, bias = _of_width(trained.in_order_of(class_names, task), trained.where, base)
        return LinearHead(weight, bias, is_trained=True)
    given = _read_head(task, class_names) if task.head else None
    if base.architecture.zero_shot is None:
        assert given is not None
        head: Head = LinearHead(*_of_width(given, str(task.head), base))
    else:
        parts = base_parts(base, task, class_names)
        head = ZeroShotHead(parts["projection"], given[0] if given else parts["head"], parts["logit_scale"])
    if given and (same := _equal_rows(torch.cat([given[0], given[1][:, None]], dim=1))):
        one, other = (class_names[row] for row in same)
        raise TaskError(f"{task.head}: the rows of {one!r} and {other!r} are the same")
    return head


def check_head(model: ModelSource, base: ModelSource, task: Task) -> None:
    """Refuse what cannot work before anything large is downloaded.

    Raises:
        StatisticsError: there is nothing to classify with: the task's own head, a classifier of the model, or a text
            tower, its projection and tokenizer.
    """
    if not task.head and has_head(model, base.architecture, task):
        return
    zero_shot = base.architecture.zero_shot
    if not base.has_text_tower and (task.head is None or zero_shot is not None):
        remedy = (
            f"name a full model ({zero_shot.model_class}) with --base"
            if zero_shot
            else "give the task a head of its own (head: FILE, with a weight [classes, width] and a bias [classes])"
        )
        raise StatisticsError(
            f"{base}: it has no text tower and no projection to classify {task.name!r} with: {remedy}"
        )
    if not can_classify(model, base, task):
        raise StatisticsError(
            f"{base}: it has no tokenizer to read the classes of {task.name!r} with: save the files of the one that it "
            "was trained with beside it (CLIPProcessor.from_pretrained(...).save_pretrained(folder)), or name another "
            "base"
        )


def can_classify(model: ModelSource, base: ModelSource, task: Task) -> bool:
    """Whether images of a task can be classified: the model or the task has a head, or the base makes one."""
    if task.head is None and has_head(model, base.architecture, task):
        return True
    if task.head is None:
        return base.has_text_tower and base.has_tokenizer
    return base.has_text_tower or base.architecture.zero_shot is None


def home_of(model: ModelSource, given: ModelRef | None, tasks: Sequence[Task]) -> ModelSource:
    """Where the text tower and the image processor of a model come from: its base, or the model itself where it needs
    no other.

    Raises:
        MismatchError, UsageError: as in `base_of`.
    """
    is_complete = not model.is_adapter and any(name in model.files for name in PROCESSOR_FILES)
    if given is None and is_complete and all(has_head(model, model.architecture, task) for task in tasks):
        return model
    return base_of(model, given)


# --- from texts -----------------------------------------------------------------------------------------------------


def base_parts(base: ModelSource, task: Task, class_names: Sequence[str]) -> dict[str, Tensor]:
    """What a zero-shot head takes from its base, out of the cache, or made and kept there.

    Returns:
        `projection` [d, w], `logit_scale` [] and, unless the task has its own, `head` [classes, d].
    """
    path = _cached(base, task, class_names)
    try:
        parts = load_file(path)
        _check_parts(parts, base, task, class_names)
        return parts
    except (OSError, SafetensorError, CheckpointError):
        pass  # not there yet, damaged, or kept by a release that did not look: it is made again
    folder = base.folder_with_tokenizer()
    model, zero_shot = load_full(folder)
    width = base.vision_config[base.architecture.width]
    projection = model.get_parameter(zero_shot.projection).detach() if zero_shot.projection else torch.eye(width)
    parts = {"projection": projection, "logit_scale": model.get_parameter(zero_shot.logit_scale).detach()}
    if not task.head:
        tokenizer = _load_tokenizer(base, folder, zero_shot)
        try:
            parts["head"] = text_head(model, zero_shot, tokenizer, class_names, task.templates)
        except IndexError as error:
            raise CheckpointError(f"{base}: its tokenizer gives tokens that its text tower does not have") from error
    _check_parts(parts, base, task, class_names)

    def write(path: Path) -> None:
        with atomic_file(path) as unfinished:
            save_file({name: tensor.contiguous() for name, tensor in parts.items()}, unfinished)

    keep(path, write)
    return parts


def _check_parts(parts: Mapping[str, Tensor], base: ModelSource, task: Task, class_names: Sequence[str]) -> None:
    """Refuse what no class could be told apart with.

    Raises:
        CheckpointError: something is missing, NaN or Inf, or two classes have the same row.
    """
    for name in ("projection", "logit_scale", *([] if task.head else ["head"])):
        if name not in parts:
            raise CheckpointError(f"{base}: no {name}")
        check_weights(parts[name], str(base), name)
    if not task.head and (same := _equal_rows(parts["head"])):
        one, other = (class_names[row] for row in same)
        raise CheckpointError(
            f"{base}: its tokenizer and text tower make no difference between {one!r} and {other!r} of task "
            f"{task.name!r}: the tokenizer is another model's, or both names are read alike (case does not count)"
        )


def _equal_rows(head: Tensor) -> tuple[int, int] | None:
    """Two rows of a head that are the same; None if all are different."""
    _, group = torch.unique(head, dim=0, return_inverse=True)
    first: dict[int, int] = {}
    for row, number in enumerate(group.tolist()):
        if number in first:
            return first[number], row
        first[number] = row
    return None


def _load_tokenizer(base: ModelSource, folder: Path, zero_shot: ZeroShot) -> Callable[..., Any]:
    """The tokenizer of a base, known to be of a kind that its text tower was trained with."""
    from transformers import AutoTokenizer

    settings = folder / "tokenizer_config.json"
    kind = read_json(settings, str(base)).get("tokenizer_class") if settings.is_file() else None
    if kind is not None and kind not in zero_shot.tokenizer_classes:
        raise CheckpointError(
            f"{base}: {settings.name} says that its tokenizer is a {kind}, and a {zero_shot.model_class} reads the "
            f"tokens of a {zero_shot.tokenizer_classes[0]}: name a base with its own tokenizer"
        )

    def tokens_of(prompts: list[str], **options: Any) -> Any:
        try:
            return tokenizer(prompts, **options)
        except Exception as error:  # the tokenizers library raises nothing more special
            raise CheckpointError(f"{base}: its tokenizer cannot read {prompts[0]!r}: {one_line(error)}") from error

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:
        raise CheckpointError(
            f"{base}: {one_line(error).partition('. ')[0]}: pip install sentencepiece protobuf (a base that has a "
            "tokenizer.json needs neither)"
        ) from error
    except Exception as error:  # as above
        raise CheckpointError(f"{base}: its tokenizer cannot be read: {one_line(error)}") from error
    return tokens_of


def _cached(base: ModelSource, task: Task, class_names: Sequence[str]) -> Path:
    prompts = None if task.head else [list(class_names), list(task.templates)]
    identity = hashlib.sha256(json.dumps([base.content_sha, prompts]).encode()).hexdigest()[:24]
    return cached_path("heads", f"{task.file_name}-{identity}.safetensors")


@torch.no_grad()
def text_head(
    model: Any,
    zero_shot: ZeroShot,
    tokenizer: Callable[..., Any],
    class_names: Iterable[str],
    templates: Sequence[str],
) -> Tensor:
    """One unit row per class: [classes, d]."""
    device = next(model.parameters()).device
    length: dict[str, Any] = {"padding": True}
    if zero_shot.is_padded:
        length = {
            "padding": "max_length",
            "max_length": int(model.config.text_config.max_position_embeddings),
        }
    rows = []
    for name in class_names:
        prompts = [template.replace("{}", name) for template in templates]
        tokens = tokenizer(prompts, **length, truncation=True, return_tensors="pt").to(device)
        rows.append(normalize(normalize(zero_shot.embed(model, tokens), dim=-1).mean(0), dim=-1))
    return torch.stack(rows)


# --- from a file ----------------------------------------------------------------------------------------------------


def _read_head(task: Task, class_names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The head that a task names: weight [classes, d] and bias [classes], zero where the file has none."""
    path = Path(str(task.head))
    try:
        check_whole(path, f"task {task.name!r}")
        tensors = load_file(path)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise TaskError(f"{task.head}: cannot be read as the head of a task: {error}") from error
    if "weight" not in tensors or tensors["weight"].ndim != 2:
        raise TaskError(f"{task.head}: a head is a tensor 'weight' [classes, projection_dim]; found {sorted(tensors)}")
    weight = tensors["weight"].float()
    if len(weight) != len(class_names):
        raise TaskError(f"{task.head}: {len(weight)} rows for the {len(class_names)} classes of {task.name!r}")
    bias = tensors.get("bias", weight.new_zeros(len(weight))).float()
    if bias.shape != weight.shape[:1]:
        raise TaskError(f"{task.head}: 'bias' has shape {list(bias.shape)}, not [{len(weight)}]")
    for name, values in (("weight", weight), ("bias", bias)):
        if not is_finite(values):
            raise TaskError(f"{task.head}: NaN or Inf in {name}")
    return weight, bias


def _of_width(head: tuple[Tensor, Tensor], where: str, base: ModelSource) -> tuple[Tensor, Tensor]:
    """A linear head, known to read as many numbers as a tower of the base's shape gives."""
    kind = base.architecture.classification
    size = base.vision_config[base.architecture.width] * (kind.parts if kind else 1)
    if head[0].shape[1] != size:
        raise TaskError(f"{where}: its rows have {head[0].shape[1]} numbers, the features of {base} {size}")
    return head
