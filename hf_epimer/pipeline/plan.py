"""What is known of a merge before a weight is read: `Plan`, with one `PlannedModel` for each checkpoint.

Data only; `planner.make_plan` makes one, `inputs`, `merge` and the analyses read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from hf_epimer.curvature.request import CurvatureRequest
from hf_epimer.hub.source import Source
from hf_epimer.lora import works_in_core
from hf_epimer.methods import Method
from hf_epimer.methods.statistic import StatisticKind
from hf_epimer.models.any_architecture import Treatment
from hf_epimer.models.architecture import Architecture, Classification
from hf_epimer.models.source import ModelSource
from hf_epimer.models.trained_head import is_classifier
from hf_epimer.numerics.subspace import capped_rank
from hf_epimer.pipeline.recipe import MergeRecipe
from hf_epimer.tasks.dataset import TaskImages
from hf_epimer.tasks.task import Task
from hf_epimer.types import Shape


@dataclass(frozen=True)
class CurvatureFile:
    """A file of curvature statistics that is there.

    Attributes:
        source: the repo or folder that it lies in, or the file itself.
        name: of the file.
    """

    source: Source
    name: str

    @property
    def label(self) -> str:
        """The label of the model that it belongs to."""
        return self.source.label

    @property
    def size(self) -> int:
        """Bytes; 0 where they are not known."""
        return self.source.sizes.get(self.name, 0)

    def fetch(self) -> Path:
        """Its local path, downloaded and checked if need be."""
        return self.source.fetch(self.name)

    def __str__(self) -> str:
        return str(self.source)


@dataclass(frozen=True)
class PlannedModel:
    """One checkpoint or adapter of a merge.

    Attributes:
        source: its files, at one commit, and what they say of it: whether it is an adapter, its config and so on.
        task: what it was tuned on; None where that is not known.
        weight: l_t; those of all models sum to 1.
        curvature: statistic -> the file that it is in, or what is to be measured.
        images: those of its task on which the merge is calibrated, refined or its alpha chosen; None without.
    """

    source: ModelSource
    task: Task | None
    weight: float
    curvature: Mapping[StatisticKind, CurvatureFile | CurvatureRequest] = field(default_factory=dict)
    images: TaskImages | None = None

    @property
    def label(self) -> str:
        """Its name in this merge, unique."""
        return self.source.label

    def __str__(self) -> str:
        return str(self.source)


@dataclass(frozen=True)
class Plan:
    """A merge that has been resolved and checked, with nothing read but configs and file lists.

    Attributes:
        recipe: with every reference pinned to a commit and every option filled in.
        treatment: what becomes of every tensor of models that are of no known family; None of those of a family.
    """

    recipe: MergeRecipe
    method: Method
    base: ModelSource
    models: tuple[PlannedModel, ...]
    treatment: Treatment | None = None

    @property
    def architecture(self) -> Architecture:
        """The family that all models are of."""
        return self.base.architecture

    @property
    def shapes(self) -> dict[str, Shape]:
        """Canonical name -> shape of every parameter that will be merged."""
        return self.treatment.shapes if self.treatment else self.architecture.shapes(self.base.vision_config)

    @property
    def matrices(self) -> dict[str, Shape]:
        """Name -> shape of those that are matrices to the method."""
        return self.treatment.matrices if self.treatment else {n: s for n, s in self.shapes.items() if len(s) == 2}

    @property
    def weights(self) -> tuple[float, ...]:
        """l_t of every model."""
        return tuple(model.weight for model in self.models)

    @property
    def tasks(self) -> list[Task]:
        """The tasks that are known, each once, in the order of the models."""
        return [task for task, _ in self.tuned_on]

    @property
    def tuned_on(self) -> list[tuple[Task, ModelSource]]:
        """The tasks that are known, each with the first model that was tuned on it: its classifier is the task's."""
        first: dict[str, tuple[Task, ModelSource]] = {}
        for model in self.models:
            if model.task:
                first.setdefault(model.task.name, (model.task, model.source))
        return list(first.values())

    @cached_property
    def has_heads(self) -> bool:
        """Whether a model has a classifier of its own, so that such lie beside the merge."""
        return any(model.source.head_files or is_classifier(model.source, self.architecture) for model in self.models)

    @property
    def output(self) -> Architecture | Classification:
        """What the merge is written as: with classifiers beside it the family's class for them, without classes."""
        return (self.has_heads and self.architecture.classification) or self.architecture

    @property
    def statistic(self) -> StatisticKind | None:
        """The curvature that the method is given beside the weights; None where it needs none or does without."""
        needed = self.method.statistic(self.recipe.options)
        enough = any if self.method.does_without else all
        return needed if enough(needed in model.curvature for model in self.models) else None

    @property
    def only_adapters(self) -> bool:
        """Whether there is no full checkpoint among the models, so that the result can be an adapter, too."""
        return all(model.source.is_adapter for model in self.models)

    @property
    def writes_adapter(self) -> bool:
        """Whether the result is an adapter rather than a full checkpoint."""
        return self.only_adapters and not self.recipe.dense

    @property
    def reads_base(self) -> bool:
        """Whether the base's weights are needed: adapters that become an adapter in their core need its shapes only,
        which are in its config, and what they replace."""
        in_core = self.writes_adapter and works_in_core(self.method, self.recipe.options)
        return not in_core or self.recipe.evaluate or self.recipe.refine or bool(self.to_estimate)

    @property
    def measured(self) -> list[CurvatureFile]:
        """Curvature in files that are there."""
        return [entry for _, entry in self._curvature() if isinstance(entry, CurvatureFile)]

    @property
    def to_estimate(self) -> list[tuple[StatisticKind, CurvatureRequest]]:
        """Curvature that is to be measured first."""
        return [(statistic, entry) for statistic, entry in self._curvature() if isinstance(entry, CurvatureRequest)]

    @property
    def data_sets(self) -> list[TaskImages]:
        """Images that will be read, one entry for each task."""
        read = [request.images for _, request in self.to_estimate]
        read += [model.images for model in self.models if model.images]
        return list({images.task.name: images for images in read}.values())

    @property
    def calibration_bytes(self) -> int:
        """Of the hidden states that a calibration keeps on the disk: two towers, twice, in float32; 0 without one. In a
        GPU's memory, where that has room, it keeps half of them instead."""
        if not self.recipe.calibrate:
            return 0
        images = sum(model.images.sampling.samples or 0 for model in self.models if model.images)
        width = int(self.base.vision_config[self.architecture.width])
        return 16 * images * self.recipe.views * self.base.positions * width

    def learnt_from(self, count: int) -> range:
        """Which of so many images of a task calibration and refinement learn from: all, but for the tenth that a
        refinement is judged by, if there is one."""
        return range(count - max(1, count // 10) if self.recipe.refine else count)

    @property
    def refinement_bytes(self) -> int:
        """Of what a refinement keeps on the disk: pictures in float16, and its state in float32; 0 without one."""
        if not self.recipe.refine:
            return 0
        images = sum(model.images.sampling.samples or 0 for model in self.models if model.images)
        config = self.base.vision_config
        return 2 * images * config["num_channels"] * config["image_size"] ** 2 + 16 * sum(
            map(prod, self.shapes.values())
        )

    @property
    def made_from(self) -> str:
        """What a method that does without curvature has of it here, and what would make the merge better."""
        if not self.method.does_without:
            return ""
        if self.treatment:
            return "the checkpoints alone"
        needed = self.method.statistic(self.recipe.options)
        without = [model.label for model in self.models if needed not in model.curvature]
        if self.recipe.calibrate:
            return "images of every task: measured curvature, then calibrated"
        better = "it would be better calibrated, on images of every task"
        if needed is None or len(without) == len(self.models):
            return "the checkpoints alone; with published statistics, or images of every task, it would be better"
        if without:
            return f"curvature, but for {', '.join(without)} the checkpoints alone; {better}"
        return f"curvature of every task, in closed form; {better}"

    def at_alpha(self, alpha: float) -> Plan:
        """The same merge with its alpha chosen."""
        options = replace(self.recipe.options, alpha=alpha)
        return replace(self, recipe=replace(self.recipe, options=options, tune_alpha=False))

    def without_curvature(self) -> Plan:
        """The same merge with no curvature read or measured."""
        return replace(self, models=tuple(replace(model, curvature={}) for model in self.models))

    def summary(self) -> dict[str, Any]:
        """What `--dry-run` prints."""
        rank = getattr(self.recipe.options, "rank", None) or 0
        ranks = {
            name: capped_rank(rank, (m, n), len(self.models)) if rank else 0 for name, (m, n) in self.matrices.items()
        }
        read = [self.base] * self.reads_base + [model.source for model in self.models]
        images = [f"{model.label}: {model.images}" for model in self.models if model.images]
        return {
            "base": str(self.base),
            "models": [str(model) for model in self.models],
            "tasks": {model.label: model.task.name for model in self.models if model.task},
            "method": self.method.name,
            "made_from": self.made_from,
            "options": vars(self.recipe.options) if self.recipe.options else {},
            "writes": "adapter" if self.writes_adapter else "checkpoint",
            "weights": list(self.weights),
            "statistics": [str(file) for file in self.measured],
            "to_estimate": [
                f"{statistic} of {request.model.label}: {request.images}" for statistic, request in self.to_estimate
            ],
            "calibrate_on": images if self.recipe.calibrate else [],
            "calibration_bytes": self.calibration_bytes,
            "refine_on": images if self.recipe.refine else [],
            "refine_steps": self.recipe.refine_steps if self.recipe.refine else 0,
            "refinement_bytes": self.refinement_bytes,
            "tune_alpha_on": images if self.recipe.tune_alpha else [],
            "parameters": len(self.shapes),
            "matrices": len(self.matrices),
            **(self.treatment.summary() if self.treatment else {}),
            "capped_ranks": {name: capped for name, capped in ranks.items() if capped < rank},
            "data": [
                f"{images.task.name}: {'streamed, of ' * images.is_streamed}{images.nbytes / 1e9:.2f} GB"
                for images in self.data_sets
                if images.nbytes
            ],
            "data_bytes_to_read": sum(images.nbytes for images in self.data_sets if not images.is_streamed),
            "bytes_to_read": sum(source.weight_bytes for source in read) + sum(file.size for file in self.measured),
            "out": str(self.recipe.target),
            "push_to": self.recipe.push_to,
        }

    def _curvature(self) -> list[tuple[StatisticKind, CurvatureFile | CurvatureRequest]]:
        """All curvature that will be read, one statistic after the other."""
        statistics = dict.fromkeys(statistic for model in self.models for statistic in model.curvature)
        pairs = ((statistic, model.curvature.get(statistic)) for statistic in statistics for model in self.models)
        return [(statistic, entry) for statistic, entry in pairs if entry]
