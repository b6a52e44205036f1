"""Where the statistics of a merge come from: --fisher, the checkpoint itself, the local cache, or else an estimate.

Estimates are made when the merge begins, on the task's training data; here nothing is measured and no tensor read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hf_epimer.curvature.files import FILE_OF, NAMES, kind_of
from hf_epimer.curvature.request import CurvatureRequest
from hf_epimer.errors import DataError, HubError, NotFoundError, StatisticsError, UsageError
from hf_epimer.hub import source as hub
from hf_epimer.hub.refs import ModelRef
from hf_epimer.hub.source import Source
from hf_epimer.methods import METHODS
from hf_epimer.methods.statistic import Statistic
from hf_epimer.models.files import has_text_tower
from hf_epimer.models.head import check_head
from hf_epimer.pipeline.recipe import MergeRecipe
from hf_epimer.tasks.dataset import Sampling, TaskImages, data_revision, is_large
from hf_epimer.tasks.task import Task


def find_statistics(
    recipe: MergeRecipe,
    needs: Statistic | None,
    asked_by: str,
    base: Source,
    models: Sequence[Source],
    tasks: Sequence[Task | None],
    optional: bool,
) -> tuple[Source | CurvatureRequest, ...]:
    """Where each model's statistics come from; empty when the method needs none.

    Args:
        needs: which ones; None for none.
        asked_by: the method, for messages.
        optional: empty, too, when none are given and some would have to be estimated or cannot be had.

    Raises:
        StatisticsError: there is no way to them, listing the ways and the methods that need none.
    """
    if recipe.fisher and needs == "projected":
        raise UsageError("--fisher: the projected metric is measured anew for every merge, no file can hold it")
    if needs is None:
        if recipe.fisher:
            users = ", ".join(m.name for m in METHODS.values() if m.needs)
            raise UsageError(f"--fisher: {asked_by} uses no Fisher information; {users} do")
        return ()
    given = _given_statistics(recipe, models, needs)
    found: list[Source | CurvatureRequest] = []
    lacking, reasons = [], []
    for model, task in zip(models, tasks, strict=True):
        if model.label in given:
            found.append(given[model.label])
        elif needs != "projected" and FILE_OF[needs] in model.files:
            found.append(model)
        elif task is None or not has_text_tower(base):
            lacking.append(str(model))
        else:
            try:
                found.append(_cached_or_estimate(recipe, needs, base, model, task))
            except (HubError, DataError) as error:  # its data cannot be reached; there are other ways
                lacking.append(str(model))
                reasons.append(f" (not on {task.dataset} now: {error})")
    if optional and not recipe.fisher and (lacking or any(isinstance(entry, CurvatureRequest) for entry in found)):
        return ()
    if lacking:
        free = ", ".join(name for name, other in METHODS.items() if other.needs is None)
        ways = [f"give it with --fisher, put {FILE_OF[needs]} beside the weights (hf-epimer fisher makes it)"]
        if has_text_tower(base):
            ways.append("label the checkpoint with its task (dtd=REF), or add --task FILE, so that it can be estimated")
        else:
            ways.append("name a full CLIP model with --base so that it can be estimated (this one has no text tower)")
        raise StatisticsError(
            f"{asked_by} needs the {NAMES[needs]} of {', '.join(lacking)}: "
            f"{', '.join(ways[needs == 'projected' :])}{''.join(reasons[:1])}, or choose a method that needs no data: "
            f"{free}"
        )
    return tuple(found)


def find_images(
    recipe: MergeRecipe, purpose: str, base: Source, models: Sequence[Source], tasks: Sequence[Task | None]
) -> tuple[TaskImages, ...]:
    """The images of every model's task, those that curvature is estimated on, for another `purpose`.

    Raises:
        UsageError: a model's task is not known.
        StatisticsError: the base has no text tower to see images of that task with.
        HubError, DataError: a data set cannot be reached, or is not there.
    """
    found = []
    for model, task in zip(models, tasks, strict=True):
        if task is None:
            raise UsageError(
                f"{model}: to {purpose}, its task must be known: label it (dtd={model.ref.location}) or add --task FILE"
            )
        check_head(base, task)
        data_revision(task)  # whether it can be reached is found out now
        found.append(_images(recipe, task))
    return tuple(found)


def _images(recipe: MergeRecipe, task: Task) -> TaskImages:
    return TaskImages(task, Sampling(recipe.samples, seed=recipe.seed, streaming=is_large(task)))


def _cached_or_estimate(
    recipe: MergeRecipe, needs: Statistic, base: Source, model: Source, task: Task
) -> Source | CurvatureRequest:
    request = CurvatureRequest(model, base, _images(recipe, task))
    if needs == "projected":
        return request
    path = request.cached(kind_of(needs))
    return _statistics_source(ModelRef(str(path), label=model.label), needs) if path.is_file() else request


def _given_statistics(recipe: MergeRecipe, models: Sequence[Source], needs: Statistic) -> dict[str, Source]:
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
        given[str(ref.label)] = _statistics_source(ref, needs)
    return given


def _statistics_source(ref: ModelRef, needs: Statistic) -> Source:
    path = Path(ref.location)
    if ref.is_local and path.is_file():
        return Source(ref, str(ref.label), frozenset({path.name}), {path.name: path.stat().st_size})
    source = hub.resolve(ref)
    if FILE_OF[needs] not in source.files:
        raise NotFoundError(f"--fisher {ref}: there is no {FILE_OF[needs]}")
    return source


def statistics_name(source: Source, statistic: Statistic) -> str:
    """The name of the file that holds this statistic: the one in the reference's folder, or the reference itself."""
    return FILE_OF[statistic] if FILE_OF[statistic] in source.files else next(iter(source.files), "")
