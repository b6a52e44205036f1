"""Models of no family that is known here: which of their tensors a method may merge, and what becomes of the others.

Nothing but names, shapes and a config is known of such a model, so that it merges without data:

    by the method       matrices, and convolutions as the matrix [out, in * kernel]
    by the mean         everything else: vectors, and those matrices whose rows are no outputs of a layer or whose size
                        says nothing of the layer: embeddings and heads
    as in the base      what --skip names, and what is no number to average (counters, masks)
    not of its own      a head that is not stored, for it is the embedding (tied weights)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NoReturn

from hf_epimer.checkpoints.reader import COUNTERS, FORMATS
from hf_epimer.errors import CheckpointError, MismatchError, UsageError
from hf_epimer.models.architecture import Architecture
from hf_epimer.types import Shape

Stored = Mapping[str, tuple[str, Shape]]
"""Name -> type, as safetensors calls it, and shape of every tensor of a checkpoint."""

_EMBEDDING = re.compile(r".*embed.*|wte|wpe|shared|relative_attention_bias")
"""What the module is called whose rows are tokens or positions."""

_CLASSES = re.compile(r"score|classifier|head|qa_outputs")
_HEAD = re.compile(rf"lm_head|embed_out|{_CLASSES.pattern}")
"""What the module is called, or one around it, whose rows are classes or tokens."""

_NUMBERED = re.compile(r"(?<=\.)\d+(?=\.)")


def architecture_of_none(config: Mapping[str, Any]) -> Architecture:
    """What a config.json says of a model whose family is not known here, in transformers' words or in diffusers'."""
    is_of_diffusers = "_class_name" in config
    kinds = config.get("architectures") or [config.get("_class_name")]
    return _unknown(
        _name_or(config.get("model_type") or config.get("_class_name"), "unknown"),
        "diffusers" if is_of_diffusers else "transformers",
        _name_or(kinds[0] if isinstance(kinds, list) else None, "AutoModel"),
    )


def _name_or(name: Any, otherwise: str) -> str:
    """A stranger's word, if it looks like one that a card may have in it."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]{1,60}", name) else otherwise


@cache
def _unknown(model_type: str, library: str, output_class: str) -> Architecture:
    def unknown(*_: Any) -> NoReturn:
        raise CheckpointError(f"model type {model_type!r} is of no family that is known here")

    return Architecture(
        name=f"{model_type} model",
        tag=model_type,
        model_types={model_type: None},
        fields={},
        parameters=unknown,
        roots=(),
        library=library,
        output_class=output_class,
        since="",
        tower_classes=(),
        processors=(),
        features=unknown,
        positions=unknown,
        blocks="",
        residuals=(),
        data_free=True,
    )


@dataclass(frozen=True)
class Treatment:
    """What becomes of every tensor of a base.

    Attributes:
        stored: all of them, as they lie in its files.
        matrices: those that the method merges -> their shape as a matrix.
        averaged: those that the mean merges.
        kept: those that stay.
        tied: heads that some checkpoint stores and another does not -> the embedding that they are.
    """

    stored: Stored
    matrices: dict[str, Shape]
    averaged: tuple[str, ...]
    kept: tuple[str, ...]
    tied: dict[str, str]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name -> shape of whatever is merged; that of a matrix where it is merged as one."""
        return {
            name: self.matrices.get(name, shape) for name, (_, shape) in self.stored.items() if name not in self.kept
        }

    def summary(self) -> dict[str, Any]:
        """For `--dry-run`: what the rules came to, layers of one kind in one line."""
        return {
            "by_the_method": _alike(self.matrices),
            "by_the_mean": _alike(self.averaged),
            "as_in_the_base": _alike(self.kept),
            "tied": [f"{head} is {embedding}" for head, embedding in self.tied.items()],
        }


def treat(config: Mapping[str, Any], base: Stored, models: Mapping[str, Stored], skip: Sequence[str] = ()) -> Treatment:
    """Which rule each tensor of a base falls under.

    Args:
        config: of the base.
        models: of each model, by how messages name it.
        skip: patterns of names (`*` for any run of letters) that stay as they are in the base, whatever models have.

    Raises:
        UsageError: a pattern fits no name.
        CheckpointError: weights are stored quantised.
        MismatchError: a model has other tensors than the base beside what is skipped, other classes or tokens.
    """
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for stored in (base, *models.values()) for name in stored):
            raise UsageError(
                f"--skip {pattern!r} fits no tensor of the base, which has {', '.join(list(base)[:3])} ..."
            )
    for label, stored in {"the base": base, **models}.items():
        _check_types(label, stored)
    vocabulary = _vocabulary(config)
    tied = _check_alike(_without(base, skip), {label: _without(of, skip) for label, of in models.items()}, vocabulary)
    matrices: dict[str, Shape] = {}
    averaged, kept = [], []
    for name, (dtype, shape) in base.items():
        if dtype in COUNTERS.values() or not math.prod(shape) or any(fnmatchcase(name, pattern) for pattern in skip):
            kept.append(name)
        elif len(shape) in (2, 4) and not _is_table(name, shape, vocabulary):
            matrices[name] = (shape[0], math.prod(shape[1:]))
        else:
            averaged.append(name)
    return Treatment(base, matrices, tuple(averaged), tuple(kept), tied)


def _without(stored: Stored, skip: Sequence[str]) -> Stored:
    return {name: of for name, of in stored.items() if not any(fnmatchcase(name, pattern) for pattern in skip)}


def is_of_classes(name: str) -> bool:
    """Whether a parameter is one of a layer that tells classes apart, by the names of its modules."""
    return any(map(_CLASSES.fullmatch, name.split(".")))


def _is_table(name: str, shape: Shape, vocabulary: int | None) -> bool:
    """Whether a matrix is an embedding or a head, by its size or its name."""
    modules = [part for part in name.split(".") if part not in ("weight", "bias")]
    is_named_so = bool(_EMBEDDING.fullmatch(modules[-1])) or any(map(_HEAD.fullmatch, modules))
    return is_named_so or vocabulary in shape[:1]


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    """How many tokens there are, where the config says it."""
    sections = [config, *(section for section in config.values() if isinstance(section, dict))]
    sizes = [section["vocab_size"] for section in sections if isinstance(section.get("vocab_size"), int)]
    return sizes[0] if sizes else None


def _check_types(label: str, stored: Stored) -> None:
    strange = {dtype for dtype, _ in stored.values()} - {*FORMATS.values(), *COUNTERS.values()}
    packed = [name for name, (dtype, _) in stored.items() if dtype in ("I8", "U8") and name.endswith("weight")]
    if strange or packed:
        shown = ", ".join(sorted(strange)) or f"{stored[packed[0]][0]} ({packed[0]})"
        raise CheckpointError(
            f"{label}: its weights are stored as {shown}, quantised or no real numbers; only float32, float16 and "
            "bfloat16 can be merged (dequantise it first)"
        )


def _check_alike(base: Stored, models: Mapping[str, Stored], vocabulary: int | None) -> dict[str, str]:
    """Compare the tensors of all models with the base's; heads that only some of them store -> their embedding.

    Raises:
        MismatchError: naming what is missing, extra or shaped differently.
    """
    tied: dict[str, str] = {}
    for label, stored in models.items():
        for name in [*(base.keys() - stored.keys()), *(stored.keys() - base.keys())]:
            owner = stored if name in base else base
            if twin := _embedding_of(name, (base if name in base else stored)[name][1], owner):
                tied[name] = twin
        missing = [name for name in base if name not in stored and name not in tied]
        extra = [name for name in stored if name not in base and name not in tied]
        unlike = [name for name in base if name in stored and stored[name][1] != base[name][1]]
        if table := next((name for name in unlike if _is_resized(name, base[name][1], stored[name][1])), None):
            ours, theirs = base[table][1][0], stored[table][1][0]
            if is_of_classes(table) and ours != vocabulary:
                module = table.rpartition(".")[0]
                raise MismatchError(
                    f"{label}: it tells {theirs} classes apart, the base {ours} ({table}): rows of unlike classes have "
                    f"no mean. --skip '{module}.*' leaves them as they are in the base"
                )
            raise MismatchError(
                f"{label}: its vocabulary has {theirs} tokens, the base's {ours} ({table}): rows of unlike tokens have "
                "no mean. Bring all to one tokenizer first, or merge models that kept the base's"
            )
        problems = [
            *(f"missing {name}" for name in missing[:3]),
            *(f"unexpected {name}" for name in extra[:3]),
            *(f"{name} has shape {list(stored[name][1])} instead of {list(base[name][1])}" for name in unlike[:1]),
        ]
        if problems:
            raise MismatchError(f"{label}: the checkpoint does not fit the base: {'; '.join(problems)}")
    return tied


def _embedding_of(head: str, shape: Shape, stored: Stored) -> str | None:
    """The embedding that a head is, which a checkpoint does not store by itself: the one of its shape."""
    if len(shape) != 2 or not any(map(_HEAD.fullmatch, head.split("."))):
        return None
    twins = [
        name
        for name, (_, other) in stored.items()
        if other == shape and name.endswith(".weight") and _EMBEDDING.fullmatch(name.split(".")[-2])
    ]
    return twins[0] if len(twins) == 1 else None


def _is_resized(name: str, one: Shape, other: Shape) -> bool:
    return len(one) == len(other) == 2 and one[1] == other[1] and _is_table(name, one, None)


def _alike(names: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Names that differ in their numbers only in one line, with how many they are."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_NUMBERED.sub("*", name), []).append(name)
    return [f"{kind} ({len(alike)})" if len(alike) > 1 else alike[0] for kind, alike in kinds.items()]
