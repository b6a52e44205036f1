"""What the package has to know of a family of models, as data. Nothing here is of one family; each has a file beside.

Parameters have one canonical name each: the one in files that every version of transformers reads. Files have them in
several layouts (nested in a full model, without a prefix), modules in memory under names that change from one version
of transformers to the next; `canonical` takes any of these, `module_name` leads back to the newest module's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_epimer.errors import CheckpointError
from hf_epimer.types import Shape

if TYPE_CHECKING:
    from torch import Tensor, nn


_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name of whatever they wrap."""

_DEEPEST = 8
"""So many wrappers are taken off a name; a stranger's may consist of nothing else."""

MOST_BLOCKS, LARGEST_COUNT = 1_000, 2**16
"""Of a config from a stranger: numbers by which shapes are made before anything else of the model is seen."""


@dataclass(frozen=True)
class Residual:
    """One of the sums that a block consists of: h + scale o write(... read(norm(h)) ...).

    Attributes:
        run: (block, hidden states [n, positions, w]) -> the sum.
        reads: the linear layers that read norm(h), by their canonical names within the block.
        writes: the linear layer whose output is added to h.
        scale: the parameter [w] that multiplies that output (LayerScale); None where nothing does.
    """

    run: Callable[[nn.Module, Tensor], Tensor]
    reads: tuple[str, ...]
    writes: str
    scale: str | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """All of them, in the order in which data runs through them."""
        return (*self.reads, self.writes)


@dataclass(frozen=True)
class Classification:
    """How models of a family are trained as classifiers: by a linear layer that reads features of the tower.

    Attributes:
        trained_class: the class of transformers with both.
        output_type: `model_type` in the config.json of a merge, whose classifiers lie beside it.
        module_prefix: what the merge's class puts before the names of the tower's parameters in memory.
        features: (tower, pixels [n, 3, height, width]) -> what the linear layer reads, [n, d].
        trunk_class: of a merge, where transformers cannot make the other without classes.
        attribute: of what the merge's class returns: the features again, in Python, for cards.
        layer: what files call the linear layer, which has a weight [classes, d] and a bias [classes].
        parts: d in units of w.
        unread: beginnings of names of parameters that these features do not depend on.
    """

    trained_class: str
    output_type: str
    module_prefix: str
    features: Callable[[nn.Module, Tensor], Tensor]
    trunk_class: str | None = None
    attribute: str = "logits"
    layer: str = "classifier"
    parts: int = 1
    unread: tuple[str, ...] = ()

    @property
    def output_class(self) -> str:
        """The class of a merge."""
        return self.trunk_class or self.trained_class


@dataclass(frozen=True)
class ZeroShot:
    """The part of a full model that makes classes out of texts.

    Attributes:
        model_types: `model_type` in the config.json of models that have it.
        model_class: the class of transformers that holds both towers.
        vision: its attribute that holds the vision tower.
        files: names of those that a tokenizer is stored in.
        tokenizers: which of them are enough, each set by itself.
        tokenizer_classes: that give the tokens it was trained on.
        projection: name of the parameter [d, w] that takes a vision tower's features to the space of texts; None where
            they are in it already.
        logit_scale: name of the parameter [], the logarithm of what cosines are multiplied by.
        embed: (full model, tokens) -> projected text features [n, d], not normalised.
        is_padded: whether all texts are padded to the longest that the text tower takes, as in its training.
    """

    model_types: tuple[str, ...]
    model_class: str
    vision: str
    files: frozenset[str]
    tokenizers: tuple[frozenset[str], ...]
    tokenizer_classes: tuple[str, ...]
    projection: str | None
    logit_scale: str
    embed: Callable[[nn.Module, Any], Tensor]
    is_padded: bool = False


@dataclass(frozen=True)
class Architecture:
    """One family of models. All names but those in `nested` and `ignored` are canonical and without `prefix`.

    Attributes:
        name: for messages and cards.
        tag: of a card.
        model_types: `model_type` in config.json -> the section of it with the vision config, None where it is all.
        fields: of a vision config that decide whether two models can be merged -> transformers' defaults.
        parameters: vision config -> name and shape of every parameter, in the order of the model.
        prefix: of canonical names.
        nested: prefixes under which the parameters may lie in a file, one around the other; longest first.
        roots: first components of names.
        ignored: beginnings of names that belong to other parts of a full model, or to buffers.
        classifiers: beginnings of names of a trained classifier, which is not merged.
        unread: beginnings of names of parameters that no features depend on, as a mask token: merged, and not measured.
        renamed: (name in the newest module, canonical name) of parts of a path, where they differ; tried in this order.
        library: the module of transformers with the classes.
        output_class: of a merged model, whose config.json is a vision config.
        module_prefix: what it puts before the names of the tower's parameters in memory.
        since: the first transformers in which `output_class` has the names of `module_name`.
        tower_classes: classes with these parameters, for looking them up in a larger model.
        processors: classes of image processors, the first that the installed transformers has is used.
        carried: fields of the base's config.json that a merged model keeps beside its vision config.
        features: (tower, pixels [n, 3, height, width]) -> what is classified, [n, w].
        positions: vision config -> length of the sequence of hidden states.
        width, depth: the fields of a vision config that are w and the number of blocks.
        blocks: the list of residual blocks, in the order in which data runs through them.
        residuals: the sums of a block, in the same order.
        known: the values of `known_by` of well-known base models -> Hub id.
        known_by: fields by which a base is known.
        zero_shot: how classes are made out of texts; None where a task must bring its head.
        unsupported: values of fields with which a model is not what is described here.
        stretches: whether positions are stretched to pictures of any size.
        classification: how models are trained as classifiers; None where such models are not known.
        data_free: whether nothing of all this is known, so that models merge without data.
    """

    name: str
    tag: str
    model_types: Mapping[str, str | None]
    fields: Mapping[str, Any]
    parameters: Callable[[Mapping[str, Any]], dict[str, Shape]]
    roots: tuple[str, ...]
    library: str
    output_class: str
    since: str
    tower_classes: tuple[str, ...]
    processors: tuple[str, ...]
    features: Callable[[nn.Module, Tensor], Tensor]
    positions: Callable[[Mapping[str, Any]], int]
    blocks: str
    residuals: tuple[Residual, ...]
    prefix: str = ""
    nested: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    classifiers: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    module_prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    carried: tuple[str, ...] = ()
    known: Mapping[tuple[int, ...], str] | None = None
    known_by: tuple[str, ...] = ()
    zero_shot: ZeroShot | None = None
    unsupported: Mapping[str, Any] = field(default_factory=dict)
    stretches: bool = False
    classification: Classification | None = None
    data_free: bool = False
    width: str = "hidden_size"
    depth: str = "num_hidden_layers"

    @property
    def output_type(self) -> str:
        """`model_type` of a merged model."""
        return next(model_type for model_type, section in self.model_types.items() if section is None)

    def canonical(self, name: str) -> str | None:
        """The canonical name of a tensor, in whatever layout, None for tensors of other parts of a full model.

        A name that fits nowhere is returned as it is, so that the comparison of key sets reports it.
        """
        stripped = self.unwrapped(name)
        left_out = (*self.ignored, *self.classifiers)
        if name.startswith(left_out) or stripped.startswith(left_out):
            return None
        for newest, stored in self.renamed:
            stripped = _replaced(stripped, newest, stored)
        if stripped.split(".", 1)[0] in self.roots:
            return self.prefix + stripped
        return name

    def is_classifier(self, name: str) -> bool:
        """Whether a tensor belongs to a trained classifier."""
        return self.unwrapped(name).startswith(self.classifiers)

    def unwrapped(self, name: str) -> str:
        """A name without what programs have put before it, one around the other."""
        for _ in range(_DEEPEST):
            wrapper = next((prefix for prefix in (*_WRAPPERS, *self.nested) if name.startswith(prefix)), None)
            if wrapper is None:
                break
            name = name[len(wrapper) :]
        return name

    def owns(self, name: str) -> bool:
        """Whether this is one of the parameters' names, in whatever layout."""
        canonical = self.canonical(name) or ""
        return canonical.startswith(self.prefix) and canonical.removeprefix(self.prefix).split(".")[0] in self.roots

    def module_name(self, canonical: str, module_prefix: str | None = None) -> str:
        """What the newest transformers calls a parameter (or a layer) in memory.

        Args:
            module_prefix: of the class that it is in; None for that of `output_class`.
        """
        name = canonical.removeprefix(self.prefix)
        for newest, stored in self.renamed:
            name = _replaced(name, stored, newest)
        return (self.module_prefix if module_prefix is None else module_prefix) + name

    def vision_config(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The fields that matter from a config.json, with transformers' defaults filled in.

        Raises:
            CheckpointError: a field is damaged.
        """
        section = self.section(config, where)
        chosen = {name: section.get(name, default) for name, default in self.fields.items()}
        for name, default in self.fields.items():
            most = MOST_BLOCKS if name == self.depth else LARGEST_COUNT
            if not _is_like(default, chosen[name], most):
                shown = repr(chosen[name]) if len(repr(chosen[name])) < 40 else "something"
                wanted = f"a positive number of at most {most}" if _is_count(default) else f"like {default!r}"
                raise CheckpointError(f"{where}: {name} in config.json is {shown}, not {wanted}")
        return chosen

    def supports(self, config: Mapping[str, Any]) -> bool:
        """Whether a model with this config.json, of a `model_type` of this family, is what is described here."""
        section = config.get(self.model_types[str(config.get("model_type"))] or "", config)
        return not isinstance(section, dict) or all(
            section.get(name) != kind for name, kind in self.unsupported.items()
        )

    def section(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The part of a config.json that is the vision config: all of it, or what a full model's has under a key.

        Raises:
            CheckpointError: it is not an object.
        """
        key = self.model_types[str(config.get("model_type"))]
        if key is None:
            return dict(config)
        found: dict[str, Any] = {}
        for name in (key, f"{key}_dict"):  # the latter was written before transformers 4.27 and overrides the former
            if not isinstance(config.get(name) or {}, dict):
                raise CheckpointError(f"{where}: {name} in config.json is not an object")
            found |= config.get(name) or {}
        return found

    def known_base(self, vision_config: Mapping[str, Any]) -> str | None:
        """The Hub id of the well-known base model of this shape."""
        return (self.known or {}).get(tuple(vision_config[field] for field in self.known_by))

    def features_for(self, *, by_classifier: bool) -> Callable[[nn.Module, Tensor], Tensor]:
        """(tower, pixels) -> the features that a trained classifier reads, or any other head: [n, d]."""
        return self.classification.features if by_classifier and self.classification else self.features

    def unread_among(self, names: Iterable[str], *, by_classifier: bool) -> frozenset[str]:
        """Those of these canonical names that features do not depend on: a trained classifier's, or all others."""
        kind = self.classification if by_classifier else None
        unread = tuple(self.prefix + beginning for beginning in (*self.unread, *(kind.unread if kind else ())))
        return frozenset(name for name in names if name.startswith(unread))

    def shapes(self, vision_config: Mapping[str, Any]) -> dict[str, Shape]:
        """Canonical name -> shape of every parameter, in the order of the model."""
        return {self.prefix + name: shape for name, shape in self.parameters(vision_config).items()}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_like(default: Any, value: Any, most: int) -> bool:
    """Whether a value can stand where this default does: a count, another number, a short word, yes or no.

    Counts are positive, or 0 where the default is.
    """
    if _is_count(default):
        return _is_count(value) and min(1, default) <= value <= most
    if isinstance(default, float):
        return isinstance(value, float) or _is_count(value)
    if isinstance(default, str):
        return isinstance(value, str) and len(value) < 100
    return default is None or isinstance(value, type(default))


def _replaced(name: str, part: str, by: str) -> str:
    """A path with a run of its components replaced."""
    return re.sub(rf"(?<![^.]){re.escape(part)}(?![^.])", by, name)
