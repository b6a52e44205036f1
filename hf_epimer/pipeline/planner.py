"""From a recipe to a plan: resolve -> label -> check -> find curvature -> pin.

Whatever can go wrong for reasons known beforehand (rights, configs, missing statistics, a target folder in use) goes
wrong here, before a weight is read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from hf_epimer.checkpoints.folders import check_target
from hf_epimer.errors import DataError, HubError, StatisticsError, UsageError
from hf_epimer.hub.card import names_in
from hf_epimer.hub.refs import LONGEST_LABEL
from hf_epimer.hub.rights import check_not_an_input, check_push_access
from hf_epimer.merging.inputs import normalized_weights
from hf_epimer.methods import Method, find_method
from hf_epimer.methods.statistic import GRADIENT_GRAM, POSITIONS
from hf_epimer.models import find_architecture
from hf_epimer.models.base import find_base
from hf_epimer.models.source import ModelSource, resolve_model
from hf_epimer.outside import expanded
from hf_epimer.pipeline.any_architecture import plan_treatment
from hf_epimer.pipeline.checks import check_distinct, check_models, check_weights, writes_adapter
from hf_epimer.pipeline.curvature_sources import with_curvature, with_images
from hf_epimer.pipeline.license import warn_of_unlike_licenses
from hf_epimer.pipeline.plan import CurvatureFile, Plan, PlannedModel
from hf_epimer.pipeline.recipe import MergeRecipe
from hf_epimer.tasks.task import Task, benchmark_tasks, infer_task, load_task_file

logger = logging.getLogger(__name__)


def make_plan(recipe: MergeRecipe, *, statistics_optional: bool = False, any_architecture: bool = False) -> Plan:
    """Resolve, infer and check everything that needs no weights.

    Args:
        recipe: what is asked for.
        statistics_optional: estimate none, and do without any where not every model has its own.
        any_architecture: whether models of no family that is known here will do, too.

    Raises:
        EpimerError: one of its kinds: a reference cannot be resolved, something does not fit or is not possible.
    """
    method, recipe = _complete(recipe)
    push_to = _check_targets(recipe)
    models = _label(recipe, [resolve_model(ref) for ref in recipe.models])
    base = find_base(recipe.base, [model.source for model in models])
    _check_not_an_input(recipe, push_to, base, models)
    if base.architecture.data_free:
        if not any_architecture:
            find_architecture(base.config, str(base))  # says which there are
        plan = _plan_of_none(recipe, method, base, models)
    else:
        plan = _plan_of_family(recipe, method, base, models, statistics_optional)
    warn_of_unlike_licenses(plan)
    return plan


def _plan_of_none(recipe: MergeRecipe, method: Method, base: ModelSource, models: tuple[PlannedModel, ...]) -> Plan:
    """The plan for models of no family that is known: by names, shapes and types alone."""
    check_distinct(base, models)
    base.check_readable()
    treatment = plan_treatment(recipe, method, base, [model.source for model in models])
    return replace(_pin(recipe, method, base, models), treatment=treatment)


def _plan_of_family(
    recipe: MergeRecipe,
    method: Method,
    base: ModelSource,
    models: tuple[PlannedModel, ...],
    statistics_optional: bool,
) -> Plan:
    """The plan for models of a family that is known: with curvature and images where they are needed."""
    check_models(recipe, method, base, models)
    needs = method.statistic(recipe.options)
    models = with_curvature(
        recipe, needs, method.name, base, models, optional=statistics_optional, partly=method.does_without
    )
    models = _with_calibration(recipe, method, base, models)
    plan = _pin(recipe, method, base, models)
    check_weights(plan)
    return plan


def with_method(plan: Plan, method: Method, options: Any) -> Plan:
    """The same merge by another method: its curvature is looked for, nothing else is resolved again.

    Raises:
        StatisticsError, UsageError: as in `make_plan`.
    """
    recipe = replace(plan.recipe, method=method.name, options=options)
    models = plan.without_curvature().models
    models = with_curvature(
        recipe, method.statistic(options), method.name, plan.base, models, partly=method.does_without
    )
    return replace(plan, recipe=recipe, method=method, models=models)


# --- resolve --------------------------------------------------------------------------------------------------------


def _complete(recipe: MergeRecipe) -> tuple[Method, MergeRecipe]:
    """The method, and the recipe with its options filled in, once what needs no Hub is known to be possible."""
    method = find_method(recipe.method)
    options = method.config() if recipe.options is None else recipe.options
    if not isinstance(options, method.config):
        raise UsageError(f"{method.name} takes a {method.config.__name__}, not a {type(options).__name__}")
    normalized_weights(recipe.weights, len(recipe.models))
    if recipe.device != "cpu" and not _device_works(recipe.device):
        raise UsageError(f"--device {recipe.device} is not available here")
    return method, replace(recipe, options=options)


def _device_works(device: str) -> bool:
    try:
        return torch.empty(1, device=device).device.type != "meta"
    except (RuntimeError, AssertionError):
        return False


def _check_targets(recipe: MergeRecipe) -> str | None:
    """Refuse a folder or repo that may not be written to; the repo's name as the Hub has it, if it is to be pushed."""
    named = (*recipe.models, *([recipe.base] if recipe.base else []), *recipe.fisher)
    local = [Path(ref.location) for ref in named if ref.is_local] + [expanded(task) for task in recipe.tasks]
    check_target(recipe.target, recipe.overwrite, local)
    if recipe.push_to is None:
        return None
    check_not_an_input(recipe.push_to, [ref.location for ref in named if not ref.is_local])
    return check_push_access(recipe.push_to, create_pr=recipe.create_pr, private=recipe.private)


def _check_not_an_input(
    recipe: MergeRecipe, push_to: str | None, base: ModelSource, models: Sequence[PlannedModel]
) -> None:
    """Refuse to write over what is merged: known by all its names, and the base too that was found only now."""
    if base.ref.is_local:
        check_target(recipe.target, recipe.overwrite, [Path(base.ref.location)])
    if push_to is not None:
        sources = [base, *(model.source for model in models)]
        check_not_an_input(push_to, [source.title for source in sources if not source.ref.is_local])


# --- label ----------------------------------------------------------------------------------------------------------


def _label(recipe: MergeRecipe, sources: Sequence[ModelSource]) -> tuple[PlannedModel, ...]:
    """Every checkpoint with its task and a unique label: its own, its task's name, or its repo's or folder's name.

    Raises:
        UsageError: two models were given the same label, or accuracy is to be measured on a task that is not known.
        CheckpointError: a config says that this cannot be merged, or there are no weights that may be read.
    """
    known = {**benchmark_tasks(), **{task.name: task for task in map(load_task_file, recipe.tasks)}}
    tasks = [_task_of(source, known, needed=recipe.evaluate) for source in sources]
    labels = [source.ref.label for source in sources if source.ref.label]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"two checkpoints are labelled {label}: labels must differ")
    models = []
    for source, task, weight in zip(sources, tasks, normalized_weights(recipe.weights, len(sources)), strict=True):
        label = source.ref.label or _free_label(source, task, labels)
        labels.append(label)
        models.append(PlannedModel(source.labelled(label), task, weight))
        models[-1].source.check_readable()
    return tuple(models)


def _task_of(source: ModelSource, known: Mapping[str, Task], *, needed: bool) -> Task | None:
    by_others = infer_task(None, names_in(source.card.get("datasets")), source.ref.name, known)
    task = infer_task(source.ref.label, tasks=known) if source.ref.label else by_others
    if task and by_others and task != by_others:
        logger.warning("%s is labelled %s, but its card or name speaks of %s", source, task.name, by_others.name)
    if task is None and needed:
        raise UsageError(
            f"{source}: to measure accuracy its task must be known: label it (mnist={source.ref.location}) or add "
            f"--task FILE; known tasks: {', '.join(known)}"
        )
    return task


def _free_label(source: ModelSource, task: Task | None, taken: Sequence[str]) -> str:
    name = task.name if task else source.ref.name
    wanted = re.sub(r"[^\w.-]+", "-", name)[: LONGEST_LABEL - 4].strip("-._") or "model"  # there may come a number
    numbered = (f"{wanted}-{number}" for number in count(2))
    return next(name for name in chain([wanted], numbered) if name not in taken)


# --- find curvature -------------------------------------------------------------------------------------------------


def _with_calibration(
    recipe: MergeRecipe, method: Method, base: ModelSource, models: tuple[PlannedModel, ...]
) -> tuple[PlannedModel, ...]:
    """The models with the images, and the curvature, that a calibration, a refinement and a choice of alpha need.

    Raises:
        UsageError, StatisticsError, HubError, DataError: it was asked for and is not possible.
    """
    wanted = method.calibrates if recipe.calibrate is None else recipe.calibrate
    if wanted and not writes_adapter(recipe, models):
        try:
            seen = with_images(recipe, "calibrate", base, models)
            # what is given for the method serves its calibration, too, where it is the same file
            given = recipe if method.statistic(recipe.options) is GRADIENT_GRAM else replace(recipe, fisher=())
            return with_curvature(given, POSITIONS, "--calibrate", base, seen)
        except (UsageError, StatisticsError, HubError, DataError) as error:
            if recipe.calibrate:
                raise
            # that there is no task is nobody's fault; that its data cannot be had may be
            level = logging.WARNING if isinstance(error, HubError | DataError) else logging.INFO
            said = "%s merges are calibrated where that is possible; this one is not: %s"
            logger.log(level, said, method.name, error)
    if recipe.refine:
        return with_images(recipe, "refine", base, models)
    return with_images(recipe, "choose alpha", base, models) if recipe.tune_alpha else models


# --- pin ------------------------------------------------------------------------------------------------------------


def _pin(recipe: MergeRecipe, method: Method, base: ModelSource, models: tuple[PlannedModel, ...]) -> Plan:
    """The plan, its recipe with commits, labels and choices as they were found."""
    statistic = method.statistic(recipe.options)
    given = [model.curvature.get(statistic) for model in models] if recipe.fisher and statistic else []
    pinned = replace(
        recipe,
        calibrate=all(POSITIONS in model.curvature for model in models),
        base=replace(base.pinned, label=None),
        models=tuple(model.source.pinned for model in models),
        fisher=tuple(file.source.pinned for file in given if isinstance(file, CurvatureFile)),
        tasks=tuple(str(expanded(task).absolute()) for task in recipe.tasks),
    )
    return Plan(pinned, method, base, models)
