"""What the package knows of model architectures: canonical names, shapes, config fields. An architecture is data.

Checkpoints of one model come in several layouts: `vision_model.*` (transformers 4, and every full CLIPModel), no prefix
at all (CLIPVisionModel from transformers 5.6 on), nested below `clip.` or `model.`. Names are made canonical here and
nowhere else: with the `vision_model.` prefix, which every version of transformers reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_epimer.errors import CheckpointError
from hf_epimer.types import Shape


@dataclass(frozen=True)
class Stage:
    """Linear layers of a block that read the same input.

    Attributes:
        modules: their names within the block.
        residual: the module whose input is the residual stream to which their output is added; None where it is not.
    """

    modules: tuple[str, ...]
    residual: str | None = None


@dataclass(frozen=True)
class Architecture:
    """One family of models.

    Attributes:
        name: for messages.
        prefix: of canonical names.
        nested: prefixes under which the tower may lie in a file, longest first.
        tower: first components of the tower's own names, without prefix.
        ignored: beginnings of names that belong to other parts of a full model, or to buffers.
        head: the projection that a checkpoint may carry beside the tower; kept apart from the merge.
        model_types: `model_type` in config.json -> key of the nested tower config, or None.
        defaults: fields that decide whether two models can be merged, with transformers' defaults.
        output_class: the transformers class of a merged model.
        known: the values of `shape_fields` of well-known base models -> Hub id.
        parameters: config fields -> name (without prefix) and shape of every parameter, in the order of the model.
        blocks: the list of residual blocks, in the order in which data runs through them.
        stages: the linear layers of a block, in the same order; the last one's output ends the block, added to the
            residual stream.
    """

    name: str
    prefix: str
    nested: tuple[str, ...]
    tower: tuple[str, ...]
    ignored: tuple[str, ...]
    head: str
    model_types: Mapping[str, str | None]
    defaults: Mapping[str, Any]
    output_class: str
    output_type: str
    known: Mapping[tuple[int, ...], str]
    shape_fields: tuple[str, ...]
    parameters: Callable[[Mapping[str, Any]], dict[str, Shape]]
    blocks: str
    stages: tuple[Stage, ...]

    def canonical(self, name: str) -> str | None:
        """The canonical name of a tensor, None for tensors that are no part of the tower.

        A name that fits nowhere is returned as it is, so that the comparison of key sets reports it.
        """
        stripped = name
        for nested in self.nested:
            if name.startswith(nested):
                stripped = name[len(nested) :]
                break
        if name.startswith(self.ignored) or stripped.startswith(self.ignored) or name.endswith(self.head):
            return None
        if stripped.split(".", 1)[0] in self.tower:
            return self.prefix + stripped
        return name

    def tower_config(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The fields that matter from a config.json, with transformers' defaults filled in.

        Raises:
            CheckpointError: the config is of another model type.
        """
        model_type = str(config.get("model_type"))
        if model_type not in self.model_types:
            known = ", ".join(sorted(self.model_types))
            raise CheckpointError(f"{where}: model type {model_type!r} is not a {self.name} ({known} are)")
        nested = self.model_types[model_type]
        section = config.get(nested) or {} if nested else config
        if not isinstance(section, dict):
            raise CheckpointError(f"{where}: {nested} in config.json is not an object")
        tower = {field: section.get(field, default) for field, default in self.defaults.items()}
        for field, default in self.defaults.items():
            if isinstance(default, int) and (not isinstance(tower[field], int) or tower[field] < 1):
                raise CheckpointError(f"{where}: {field} in config.json is {tower[field]!r}, not a positive number")
        return tower

    def known_base(self, tower: Mapping[str, Any]) -> str | None:
        """The Hub id of the well-known base model with this shape."""
        return self.known.get(tuple(tower[field] for field in self.shape_fields))

    def shapes(self, tower: Mapping[str, Any]) -> dict[str, Shape]:
        """Canonical name -> shape of every parameter, in the order of the model."""
        return {self.prefix + name: shape for name, shape in self.parameters(tower).items()}
