"""What the package has to know of a family of models, as data. Nothing here is of one family; each has a file beside.

Parameters have one canonical name each: the one in files that every version of transformers reads. Files have them in
several layouts (nested in a full model, without a prefix), modules in memory under names that change from one version
of transformers to the next; `canonical` takes any of these, `module_name` leads back to the newest module's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_epimer.errors import CheckpointError
from hf_epimer.types import Shape

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Residual:
    """One of the sums that a block consists of: h + write(... read(norm(h)) ...).

    Attributes:
        run: (block, hidden states [n, positions, w]) -> the sum.
        reads: the linear layers that read norm(h), by their canonical names within the block.
        writes: the linear layer whose output is added to h.
    """

    run: Callable[[nn.Module, Tensor], Tensor]
    reads: tuple[str, ...]
    writes: str

    @property
    def layers(self) -> tuple[str, ...]:
        """All of them, in the order in which data runs through them."""
        return (*self.reads, self.writes)


@dataclass(frozen=True)
class ZeroShot:
    """The part of a full model that makes classes out of texts.

    Attributes:
        model_types: `model_type` in the config.json of models that have it.
        model_class: the class of transformers that holds both towers.
        vision: its attribute that holds the vision tower.
        files: names of those that a tokenizer is stored in.
        projection: name of the parameter [d, w] that takes a vision tower's features to the space of texts.
        logit_scale: name of the parameter [], the logarithm of what cosines are multiplied by.
        embed: (full model, tokens) -> projected text features [n, d], not normalised.
    """

    model_types: tuple[str, ...]
    model_class: str
    vision: str
    files: frozenset[str]
    projection: str
    logit_scale: str
    embed: Callable[[nn.Module, Any], Tensor]


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
        nested: prefixes under which the parameters may lie in a file, longest first.
        roots: first components of names.
        ignored: beginnings of names that belong to other parts of a full model, or to buffers.
        renamed: (name in the newest module, canonical name) of parts of a path, where they differ; tried in this order.
        library: the module of transformers with the classes.
        output_class: of a merged model, whose config.json is a vision config.
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
    renamed: tuple[tuple[str, str], ...] = ()
    carried: tuple[str, ...] = ()
    known: Mapping[tuple[int, ...], str] | None = None
    known_by: tuple[str, ...] = ()
    zero_shot: ZeroShot | None = None
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
        stripped = name
        for nested in self.nested:
            if name.startswith(nested):
                stripped = name[len(nested) :]
                break
        if name.startswith(self.ignored) or stripped.startswith(self.ignored):
            return None
        for newest, stored in self.renamed:
            stripped = _replaced(stripped, newest, stored)
        if stripped.split(".", 1)[0] in self.roots:
            return self.prefix + stripped
        return name

    def owns(self, name: str) -> bool:
        """Whether this is one of the parameters' names, in whatever layout."""
        canonical = self.canonical(name) or ""
        return canonical.startswith(self.prefix) and canonical.removeprefix(self.prefix).split(".")[0] in self.roots

    def module_name(self, canonical: str) -> str:
        """What the newest transformers' `output_class` calls a parameter (or a layer) in memory."""
        name = canonical.removeprefix(self.prefix)
        for newest, stored in self.renamed:
            name = _replaced(name, stored, newest)
        return name

    def vision_config(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The fields that matter from a config.json, with transformers' defaults filled in.

        Raises:
            CheckpointError: a field is damaged.
        """
        key = self.model_types[str(config.get("model_type"))]
        section = config.get(key) or {} if key else config
        if not isinstance(section, dict):
            raise CheckpointError(f"{where}: {key} in config.json is not an object")
        chosen = {field: section.get(field, default) for field, default in self.fields.items()}
        for field, default in self.fields.items():
            is_count = isinstance(default, int) and not isinstance(default, bool)
            if is_count and (not isinstance(chosen[field], int) or chosen[field] < 1):
                raise CheckpointError(f"{where}: {field} in config.json is {chosen[field]!r}, not a positive number")
        return chosen

    def known_base(self, vision_config: Mapping[str, Any]) -> str | None:
        """The Hub id of the well-known base model of this shape."""
        return (self.known or {}).get(tuple(vision_config[field] for field in self.known_by))

    def shapes(self, vision_config: Mapping[str, Any]) -> dict[str, Shape]:
        """Canonical name -> shape of every parameter, in the order of the model."""
        return {self.prefix + name: shape for name, shape in self.parameters(vision_config).items()}


def _replaced(name: str, part: str, by: str) -> str:
    """A path with a run of its components replaced."""
    return re.sub(rf"(?<![^.]){re.escape(part)}(?![^.])", by, name)
