"""Before any work: resolve references, infer tasks and base, find statistics, compare configs and key sets.

A `Plan` is a merge in which everything is known but the numbers. Whatever can go wrong for reasons known beforehand
(rights, configs, missing statistics, a target folder in use) goes wrong here, before a weight is read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from hf_epimer import hub
from hf_epimer.architectures import CLIP_VISION, Architecture
from hf_epimer.card import base_from_cards
from hf_epimer.checkpoints import FISHER, WEIGHTS_INDEX, Checkpoint, choose_weights, read_json
from hf_epimer.config import MergeRecipe, ModelRef
from hf_epimer.errors import CheckpointError, MismatchError, NotFoundError, StatisticsError, UsageError
from hf_epimer.hub import Source
from hf_epimer.merging import Ingredients, check_shapes, find_method, normalized_weights
from hf_epimer.methods import METHODS, Method
from hf_epimer.numerics.subspace import capped_rank
from hf_epimer.tasks import Task, benchmark_tasks, infer_task, load_task_file
from hf_epimer.writing import check_target

logger = logging.getLogger(__name__)

FISHER_FORMAT = "hf-epimer.fisher/1"


@dataclass(frozen=True)
class Plan:
    """A merge that has been resolved and checked, with nothing read but configs and file lists."""

    recipe: MergeRecipe
    method: Method
    base: Source
    models: tuple[Source, ...]
    fisher: tuple[Source, ...] | None
    tasks: tuple[Task | None, ...]
    weights: tuple[float, ...]
    tower: dict[str, Any]
    architecture: Architecture = CLIP_VISION

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every parameter that will be merged."""
        return self.architecture.shapes(self.tower)

    def summary(self) -> dict[str, Any]:
        """What `--dry-run` prints."""
        rank = getattr(self.recipe.options, "rank", None)
        matrices = {name: shape for name, shape in self.shapes.items() if len(shape) == 2}
        capped = {
            name: capped_rank(rank, (shape[0], shape[1]), len(self.models))
            for name, shape in matrices.items()
            if rank and capped_rank(rank, (shape[0], shape[1]), len(self.models)) < rank
        }
        sources = [self.base, *self.models]
        return {
            "base": str(self.base),
            "models": [str(model) for model in self.models],
            "tasks": {m.label: task.name for m, task in zip(self.models, self.tasks, strict=True) if task},
            "method": self.method.name,
            "options": vars(self.recipe.options) if self.recipe.options else {},
            "weights": list(self.weights),
            "statistics": [str(source) for source in self.fisher or ()],
            "to_estimate": [],
            "parameters": len(self.shapes),
            "matrices": len(matrices),
            "capped_ranks": capped,
            "bytes_to_read": sum(s.sizes.get(name, 0) for s in sources for name in weight_names(s))
            + sum(s.sizes.get(statistics_name(s), 0) for s in self.fisher or ()),
            "out": str(target_folder(self.recipe)),
            "push_to": self.recipe.push_to,
        }


def make_plan(recipe: MergeRecipe, *, statistics_optional: bool = False) -> Plan:
    """Resolve, infer and check everything that needs no weights.

    Args:
        recipe: what is asked for.
        statistics_optional: do without statistics where none are given and not every model has its own.
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
        hub.check_push_access(recipe.push_to, create_pr=recipe.create_pr, private=recipe.private)
    found = [hub.resolve(ref) for ref in recipe.models]
    cards = [source.card() for source in found]
    tasks = _tasks_of(recipe, found, cards)
    models = _labelled(found, tasks)
    towers = [_tower(source) for source in models]
    base = _find_base(recipe, models, cards, towers)
    if base.ref.is_local:  # a base that a card names is an input too
        check_target(target_folder(recipe), recipe.overwrite, [Path(base.ref.location)])
    tower = _tower(base)
    _check_towers(base, tower, models, towers)
    _check_distinct(base, models)
    for source in (base, *models):
        weight_names(source)
    try:
        fisher = _find_statistics(recipe, method, models)
    except StatisticsError:
        if recipe.fisher or not statistics_optional:
            raise
        fisher = None
    pinned = replace(
        recipe,
        options=options,
        base=replace(base.pinned, label=None),
        models=tuple(model.pinned for model in models),
        fisher=tuple(source.pinned for source in fisher or ()) if recipe.fisher else (),
        tasks=tuple(str(Path(task).absolute()) for task in recipe.tasks),
    )
    plan = Plan(pinned, method, base, tuple(models), fisher, tuple(tasks), weights, tower)
    for source in (base, *models):  # what lies here already can be checked now
        if source.ref.is_local:
            paths = [source.fetch(name) for name in weight_names(source)]
            _check_checkpoint(plan, Checkpoint(source.label, paths, plan.architecture.canonical))
    return plan


def target_folder(recipe: MergeRecipe) -> Path:
    """Where the merged folder goes."""
    return Path(recipe.out or f"merged-{recipe.method}")


def weight_names(source: Source) -> list[str]:
    """The names of a checkpoint's weight files.

    Raises:
        CheckpointError: it has none that may be read.
    """
    return choose_weights(source.files, str(source), lambda: source.read_text(WEIGHTS_INDEX))


def statistics_name(source: Source) -> str:
    """The name of the statistics file of a reference: its own, or the one in its folder."""
    return FISHER if FISHER in source.files else next(iter(source.files), FISHER)


def open_ingredients(plan: Plan) -> Ingredients:
    """Open all files and compare names and shapes with the base's config, before any weight is read."""
    canonical = plan.architecture.canonical
    opened = []
    for source in (plan.base, *plan.models):
        paths = [source.fetch(name) for name in weight_names(source)]
        checkpoint = Checkpoint(source.label, paths, canonical)
        _check_checkpoint(plan, checkpoint)
        opened.append(checkpoint)
    base, *models = opened
    base.label = str(replace(plan.base.pinned, label=None))
    base.shapes = {name: base.shapes[name] for name in plan.shapes}  # in the order of the model, not of the file
    if plan.fisher is None:
        statistics = None
    else:
        statistics = [_open_statistics(plan, s, m) for s, m in zip(plan.fisher, plan.models, strict=True)]
    _check_not_the_base(base, models)
    return Ingredients(base, models, plan.weights, statistics)


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
                f"{source}: --evaluate needs its task; label it (mnist={source.ref.location}) or add --task FILE; "
                f"known tasks: {', '.join(known)}"
            )
        found.append(task)
    return found


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


def _tower(source: Source) -> dict[str, Any]:
    if "config.json" not in source.files:
        raise CheckpointError(f"{source}: there is no config.json")
    return CLIP_VISION.tower_config(read_json(source.fetch("config.json"), str(source)), str(source))


def _find_base(
    recipe: MergeRecipe,
    models: Sequence[Source],
    cards: Sequence[dict[str, Any]],
    towers: Sequence[dict[str, Any]],
) -> Source:
    if recipe.base is not None:
        return hub.resolve(recipe.base)
    ref, why = base_from_cards(list(zip(models, cards, strict=True)))
    if ref is not None:
        return hub.resolve(ref)
    if why.startswith("the model cards disagree"):
        raise MismatchError(f"{why}; name the right one with --base")
    known = CLIP_VISION.known_base(towers[0])
    if known is None:
        raise UsageError(f"{why} and {models[0]} is not shaped like a well-known CLIP model: name the base with --base")
    logger.info("base %s, by the shape of %s", known, models[0])
    return hub.resolve(ModelRef(known))


def _find_statistics(recipe: MergeRecipe, method: Method, models: Sequence[Source]) -> tuple[Source, ...] | None:
    if method.needs != "fisher":
        if recipe.fisher:
            users = ", ".join(m.name for m in METHODS.values() if m.needs == "fisher")
            raise UsageError(f"--fisher: {method.name} uses no Fisher information; {users} do")
        if method.needs:
            raise StatisticsError(
                f"{method.name} needs Gram matrices of every layer's inputs: give them to merge_state_dicts in Python"
            )
        return None
    given = _given_statistics(recipe, models)
    found, lacking = [], []
    for model in models:
        source = given.get(model.label, model)
        if model.label in given or FISHER in source.files:
            found.append(source)
        else:
            lacking.append(str(model))
    if lacking:
        free = ", ".join(name for name, other in METHODS.items() if other.needs is None)
        raise StatisticsError(
            f"{method.name} needs the Fisher information of {', '.join(lacking)}: give it with --fisher, put {FISHER} "
            f"beside the checkpoint's weights, or choose a method that needs no data: {free}"
        )
    return tuple(found)


def _given_statistics(recipe: MergeRecipe, models: Sequence[Source]) -> dict[str, Source]:
    """--fisher references by the label of the model they belong to."""
    labelled = [ref for ref in recipe.fisher if ref.label]
    if labelled and len(labelled) < len(recipe.fisher):
        raise UsageError("--fisher: label all references (dtd=REF) or none of them")
    if not labelled:
        if recipe.fisher and len(recipe.fisher) != len(models):
            raise UsageError(f"--fisher: {len(models)} models but {len(recipe.fisher)} unlabelled references")
        labelled = [replace(ref, label=model.label) for ref, model in zip(recipe.fisher, models, strict=False)]
    labels = {model.label for model in models}
    given = {}
    for ref in labelled:
        if ref.label not in labels:
            raise UsageError(
                f"--fisher {ref}: no model is labelled {ref.label} (there are {', '.join(sorted(labels))})"
            )
        if ref.label in given:
            raise UsageError(f"--fisher: {ref.label} is given twice")
        given[str(ref.label)] = _statistics_source(ref)
    return given


def _statistics_source(ref: ModelRef) -> Source:
    path = Path(ref.location)
    if ref.is_local and path.is_file():
        return Source(ref, str(ref.label), frozenset({path.name}), {path.name: path.stat().st_size})
    source = hub.resolve(ref)
    if FISHER not in source.files:
        raise NotFoundError(f"--fisher {ref}: there is no {FISHER}")
    return source


def _check_checkpoint(plan: Plan, checkpoint: Checkpoint) -> None:
    check_shapes(plan.shapes, checkpoint, "the checkpoint")
    strange = {dtype for name, dtype in checkpoint.dtypes.items() if name in plan.shapes} - {
        "F32",
        "F16",
        "BF16",
        "F64",
    }
    if strange:
        raise CheckpointError(
            f"{checkpoint.label}: its weights are stored as {', '.join(sorted(strange))}; only float32, float16 and "
            "bfloat16 can be merged (dequantise it first)"
        )


def _open_statistics(plan: Plan, source: Source, model: Source) -> Checkpoint:
    path = source.fetch(statistics_name(source))
    label = f"Fisher information of {model.label} ({path.name})"
    statistics = Checkpoint(label, [path], plan.architecture.canonical)
    if statistics.metadata.get("format") != FISHER_FORMAT:
        logger.warning("%s: %s carries no %s metadata; taken as it is", model.label, path, FISHER_FORMAT)
    check_shapes(plan.shapes, statistics, "the file")
    return statistics


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_towers(
    base: Source, tower: dict[str, Any], models: Sequence[Source], towers: Sequence[dict[str, Any]]
) -> None:
    for model, other in zip(models, towers, strict=True):
        unlike = [field for field, value in tower.items() if other[field] != value]
        if unlike:
            listed = "; ".join(f"{field}: {tower[field]} | {other[field]}" for field in unlike)
            raise MismatchError(f"{model} is another architecture than the base {base.title} ({listed})")


def _check_distinct(base: Source, models: Sequence[Source]) -> None:
    seen: dict[str, Source] = {}
    for model in models:
        if model.identity == base.identity:
            raise MismatchError(f"{model} is its own base: it has nothing to merge; name its real base with --base")
        if model.identity in seen:
            logger.warning("%s is merged twice (as %s and %s)", model.title, seen[model.identity].label, model.label)
        seen[model.identity] = model


def _check_not_the_base(base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    """A copy of the base under another name; any real fine-tuned model differs in the first tensor compared."""
    for model in models:
        if all(torch.equal(model.tensor(name).float(), base.tensor(name).float()) for name in base.shapes):
            raise MismatchError(f"{model.label}: every tensor equals the base's; a model cannot be its own base")


def _device_works(device: str) -> bool:
    try:
        return torch.empty(1, device=device).device.type != "meta"
    except (RuntimeError, AssertionError):
        return False
