"""Before any work: resolve references, infer tasks and base, find statistics, compare configs and key sets.

A `Plan` is a merge in which everything is known but the numbers. Whatever can go wrong for reasons known beforehand
(rights, configs, missing statistics, a target folder in use) goes wrong here, before a weight is read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from hf_epimer.checkpoints.atomic import check_target
from hf_epimer.checkpoints.reader import FORMATS, Checkpoint, StateDict
from hf_epimer.curvature.request import CurvatureRequest
from hf_epimer.errors import CheckpointError, DataError, HubError, MismatchError, StatisticsError, UsageError
from hf_epimer.hub import push as pushing
from hf_epimer.hub import source as hub
from hf_epimer.hub.source import Source
from hf_epimer.lora import read_adapter, works_in_core
from hf_epimer.merging.inputs import check_shapes, normalized_weights
from hf_epimer.methods import Method, find_method
from hf_epimer.methods.statistic import Statistic
from hf_epimer.models.architecture import Architecture
from hf_epimer.models.base import check_towers, find_base
from hf_epimer.models.clip import CLIP_VISION
from hf_epimer.models.files import adapter_config, is_adapter, model_folder, tower_of, weight_names
from hf_epimer.numerics.subspace import capped_rank
from hf_epimer.pipeline.curvature_sources import find_images, find_statistics, statistics_name
from hf_epimer.pipeline.recipe import MergeRecipe
from hf_epimer.tasks.dataset import TaskImages
from hf_epimer.tasks.task import Task, benchmark_tasks, infer_task, load_task_file
from hf_epimer.types import Shape

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A merge that has been resolved and checked, with nothing read but configs and file lists.

    Attributes:
        statistics: what the method needs of every model, or nothing.
        images: those of every model's task on which the merge is calibrated or its alpha chosen; without, none.
        curvature: of the outputs of every model's layers, where the merge is calibrated.
    """

    recipe: MergeRecipe
    method: Method
    base: Source
    models: tuple[Source, ...]
    statistics: tuple[Source | CurvatureRequest, ...]
    tasks: tuple[Task | None, ...]
    weights: tuple[float, ...]
    tower: dict[str, Any]
    architecture: Architecture = CLIP_VISION
    images: tuple[TaskImages, ...] = ()
    curvature: tuple[Source | CurvatureRequest, ...] = ()

    @property
    def statistic(self) -> Statistic | None:
        """What the method needs to know beside the weights."""
        return self.method.statistic(self.recipe.options)

    @property
    def only_adapters(self) -> bool:
        """Whether there is no full checkpoint among the models, so that the result can be an adapter, too."""
        return all(map(is_adapter, self.models))

    @property
    def writes_adapter(self) -> bool:
        """Whether the result is an adapter rather than a full checkpoint."""
        return self.only_adapters and not self.recipe.dense

    @property
    def reads_base(self) -> bool:
        """Whether the base's weights are needed: adapters that become an adapter in their core need its shapes only,
        which are in its config, and what they replace."""
        in_core = self.writes_adapter and works_in_core(self.method, self.recipe.options)
        return not in_core or self.recipe.evaluate or bool(self.to_estimate)

    @property
    def wanted(self) -> list[tuple[Statistic, Source | CurvatureRequest]]:
        """All statistics that will be read: those of the method and those of a calibration."""
        found: list[tuple[Statistic, Source | CurvatureRequest]] = [("outputs", entry) for entry in self.curvature]
        return [*((self.statistic, entry) for entry in self.statistics if self.statistic), *found]

    @property
    def measured(self) -> list[tuple[Statistic, Source]]:
        """Statistics in files that are there."""
        return [(statistic, entry) for statistic, entry in self.wanted if isinstance(entry, Source)]

    @property
    def to_estimate(self) -> list[tuple[Statistic, CurvatureRequest]]:
        """Statistics that are not."""
        return [(statistic, entry) for statistic, entry in self.wanted if isinstance(entry, CurvatureRequest)]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every parameter that will be merged."""
        return self.architecture.shapes(self.tower)

    def at_alpha(self, alpha: float) -> Plan:
        """The same merge with its alpha chosen."""
        options = replace(self.recipe.options, alpha=alpha)
        return replace(self, recipe=replace(self.recipe, options=options, tune_alpha=False))

    def summary(self) -> dict[str, Any]:
        """What `--dry-run` prints."""
        rank = getattr(self.recipe.options, "rank", None)
        matrices = {name: shape for name, shape in self.shapes.items() if len(shape) == 2}
        capped = {
            name: capped_rank(rank, (shape[0], shape[1]), len(self.models))
            for name, shape in matrices.items()
            if rank and capped_rank(rank, (shape[0], shape[1]), len(self.models)) < rank
        }
        sources = [self.base, *self.models] if self.reads_base else self.models
        images = [f"{model.label}: {entry}" for model, entry in zip(self.models, self.images, strict=False)]
        return {
            "base": str(self.base),
            "models": [str(model) for model in self.models],
            "tasks": {m.label: task.name for m, task in zip(self.models, self.tasks, strict=True) if task},
            "method": self.method.name,
            "options": vars(self.recipe.options) if self.recipe.options else {},
            "writes": "adapter" if self.writes_adapter else "checkpoint",
            "weights": list(self.weights),
            "statistics": [str(source) for _, source in self.measured],
            "to_estimate": [
                f"{statistic} of {entry.model.label}: {entry.images}" for statistic, entry in self.to_estimate
            ],
            "calibrate_on": images if self.recipe.calibrate else [],
            "tune_alpha_on": images if self.recipe.tune_alpha else [],
            "parameters": len(self.shapes),
            "matrices": len(matrices),
            "capped_ranks": capped,
            "bytes_to_read": sum(s.sizes.get(name, 0) for s in sources for name in weight_names(s))
            + sum(source.sizes.get(statistics_name(source, statistic), 0) for statistic, source in self.measured),
            "out": str(target_folder(self.recipe)),
            "push_to": self.recipe.push_to,
        }


def make_plan(recipe: MergeRecipe, *, statistics_optional: bool = False) -> Plan:
    """Resolve, infer and check everything that needs no weights.

    Args:
        recipe: what is asked for.
        statistics_optional: estimate none, and do without any where not every model has its own.
    """
    method = find_method(recipe.method)
    options = method.config() if recipe.options is None else recipe.options
    if not isinstance(options, method.config):
        raise UsageError(f"{method.name} takes a {method.config.__name__}, not a {type(options).__name__}")
    weights = tuple(normalized_weights(recipe.weights, len(recipe.models)))
    if recipe.device != "cpu" and not _device_works(recipe.device):
        raise UsageError(f"--device {recipe.device} is not available here")
    named = (*recipe.models, *([recipe.base] if recipe.base else []), *recipe.fisher)
    local = [Path(ref.location) for ref in named if ref.is_local] + [Path(task) for task in recipe.tasks]
    check_target(target_folder(recipe), recipe.overwrite, local)
    if recipe.push_to in {ref.location for ref in named if not ref.is_local}:
        raise UsageError(f"--push-to {recipe.push_to} is one of the checkpoints to merge: push to another repo")
    if recipe.push_to:
        pushing.check_push_access(recipe.push_to, create_pr=recipe.create_pr, private=recipe.private)
    found = [hub.resolve(ref) for ref in recipe.models]
    cards = [source.card() for source in found]
    tasks = _tasks_of(recipe, found, cards)
    models = _labelled(found, tasks)
    adapters, full = [m for m in models if is_adapter(m)], [m for m in models if not is_adapter(m)]
    for source in adapters:
        adapter_config(source)
    towers = [tower_of(source) for source in full]
    if recipe.out_rank is not None and full:
        raise UsageError(f"--out-rank is of merged adapters, and {full[0]} is a full checkpoint")
    base = find_base(recipe.base, models, cards, towers)
    if base.ref.is_local:  # a base that a card names is an input too
        check_target(target_folder(recipe), recipe.overwrite, [Path(base.ref.location)])
    tower = tower_of(base)
    check_towers(base, tower, full, towers)
    _check_distinct(base, models)
    for source in (base, *models):
        weight_names(source)
    writes_adapter = not full and not recipe.dense
    if recipe.calibrate and writes_adapter:
        raise UsageError("--calibrate solves whole layers again, which no adapter can hold: add --dense")
    found_for = (base, models, tasks)
    needs = method.statistic(options)
    statistics = find_statistics(recipe, needs, method.name, *found_for, statistics_optional)
    images, curvature = _calibration(recipe, method, needs, writes_adapter, *found_for)
    calibrate = bool(images)
    if recipe.tune_alpha:
        _check_alpha(method, writes_adapter)
        images = images or find_images(recipe, "choose alpha", *found_for)
    pinned = replace(
        recipe,
        options=options,
        calibrate=calibrate,
        base=replace(base.pinned, label=None),
        models=tuple(model.pinned for model in models),
        fisher=tuple(s.pinned for s in statistics if isinstance(s, Source)) if recipe.fisher else (),
        tasks=tuple(str(Path(task).absolute()) for task in recipe.tasks),
    )
    plan = Plan(
        pinned,
        method,
        base,
        tuple(models),
        statistics,
        tuple(tasks),
        weights,
        tower,
        images=images,
        curvature=curvature,
    )
    for source in (base, *full):  # what lies here already can be checked now
        if source.ref.is_local:
            paths = [source.fetch(name) for name in weight_names(source)]
            check_checkpoint(plan.shapes, Checkpoint(source.label, paths, plan.architecture.canonical))
    promised = StateDict("base", {name: torch.empty(shape, device="meta") for name, shape in plan.shapes.items()})
    for source in adapters:
        if source.ref.is_local:
            read_adapter(model_folder(source), promised, plan.architecture.canonical, source.label, quiet=True)
    return plan


def with_method(plan: Plan, method: Method, options: Any) -> Plan:
    """The same merge by another method: its statistics are looked for, nothing else is resolved again.

    Raises:
        StatisticsError, UsageError: as in `make_plan`.
    """
    recipe = replace(plan.recipe, method=method.name, options=options)
    needs = method.statistic(options)
    statistics = find_statistics(recipe, needs, method.name, plan.base, plan.models, plan.tasks, False)
    return replace(plan, recipe=recipe, method=method, statistics=statistics)


def target_folder(recipe: MergeRecipe) -> Path:
    """Where the merged folder goes."""
    return Path(recipe.out or f"merged-{recipe.method}")


def check_checkpoint(shapes: Mapping[str, Shape], checkpoint: Checkpoint) -> None:
    """Compare a checkpoint's names, shapes and types with what the base's config promises.

    Raises:
        MismatchError: something is missing, extra or shaped differently.
        CheckpointError: it is quantised.
    """
    check_shapes(shapes, checkpoint, "the checkpoint")
    strange = {dtype for name, dtype in checkpoint.dtypes.items() if name in shapes} - set(FORMATS.values())
    if strange:
        raise CheckpointError(
            f"{checkpoint.label}: its weights are stored as {', '.join(sorted(strange))}; only float32, float16 and "
            "bfloat16 can be merged (dequantise it first)"
        )


# --- finding things -------------------------------------------------------------------------------------------------


def _tasks_of(recipe: MergeRecipe, models: Sequence[Source], cards: Sequence[dict[str, Any]]) -> list[Task | None]:
    given = {task.name: task for task in map(load_task_file, recipe.tasks)}
    known = {**benchmark_tasks(), **given}
    found = []
    for source, card in zip(models, cards, strict=True):
        datasets = card.get("datasets") or ()
        task = infer_task(
            source.ref.label, [datasets] if isinstance(datasets, str) else datasets, source.ref.name, known
        )
        if task is None and recipe.evaluate:
            raise UsageError(
                f"{source}: to measure accuracy its task must be known: label it (mnist={source.ref.location}) or add "
                f"--task FILE; known tasks: {', '.join(known)}"
            )
        found.append(task)
    return found


def _check_alpha(method: Method, writes_adapter: bool) -> None:
    if "alpha" not in method.config.__dataclass_fields__:
        raise UsageError(f"--tune-alpha: {method.name} has no alpha")
    if writes_adapter:
        raise UsageError("--tune-alpha puts whole layers into a model: for adapters add --dense")


def _calibration(
    recipe: MergeRecipe,
    method: Method,
    needs: Statistic | None,
    writes_adapter: bool,
    base: Source,
    models: Sequence[Source],
    tasks: Sequence[Task | None],
) -> tuple[tuple[TaskImages, ...], tuple[Source | CurvatureRequest, ...]]:
    """The images of a calibration and the curvature that it needs; neither where there is to be none.

    Args:
        needs: the method's own statistic; Kronecker factors given for it serve the calibration, too.

    Raises:
        UsageError, StatisticsError, HubError, DataError: it was asked for and is not possible.
    """
    wanted = method.calibrates if recipe.calibrate is None else recipe.calibrate
    if not wanted or writes_adapter:
        return (), ()
    try:
        images = find_images(recipe, "calibrate", base, models, tasks)
        own = recipe if needs == "kronecker" else replace(recipe, fisher=())
        return images, find_statistics(own, "outputs", "--calibrate", base, models, tasks, False)
    except (UsageError, StatisticsError, HubError, DataError) as error:
        if recipe.calibrate:
            raise
        logger.warning("%s merges are calibrated where that is possible; this one is not: %s", method.name, error)
        return (), ()


def _labelled(models: Sequence[Source], tasks: Sequence[Task | None]) -> list[Source]:
    """Every model with a unique label: its own, its task's name, or its repo's or folder's name.

    Raises:
        UsageError: two models were given the same label.
    """
    labels: list[str] = [source.ref.label for source in models if source.ref.label]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"two checkpoints are labelled {label}: labels must differ")
    found = []
    for source, task in zip(models, tasks, strict=True):
        label = source.ref.label or ""
        if not label:
            wanted = task.name if task else re.sub(r"[^\w.-]+", "-", source.ref.name).strip("-._") or "model"
            numbered = (f"{wanted}-{number}" for number in count(2))
            label = next(name for name in chain([wanted], numbered) if name not in labels)
            labels.append(label)
        found.append(replace(source, label=label))
    return found


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_distinct(base: Source, models: Sequence[Source]) -> None:
    seen: dict[str, Source] = {}
    for model in models:
        if model.identity == base.identity:
            raise MismatchError(f"{model} is its own base: it has nothing to merge; name its real base with --base")
        if model.identity in seen:
            logger.warning("%s is merged twice (as %s and %s)", model.title, seen[model.identity].label, model.label)
        seen[model.identity] = model


def _device_works(device: str) -> bool:
    try:
        return torch.empty(1, device=device).device.type != "meta"
    except (RuntimeError, AssertionError):
        return False
