"""Where the curvature of a merge comes from: --fisher, the checkpoint itself, the local cache, or else an estimate.

Estimates are made when the merge begins, on the task's training data; here nothing is measured and no tensor read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hf_epimer.curvature.request import CurvatureRequest, Gradients
from hf_epimer.errors import DataError, HubError, NotFoundError, StatisticsError, UsageError
from hf_epimer.hub.refs import ModelRef
from hf_epimer.hub.resolve import resolve
from hf_epimer.hub.source import Source
from hf_epimer.methods import METHODS
from hf_epimer.methods.statistic import StatisticKind
from hf_epimer.models.head import can_classify, check_head
from hf_epimer.models.source import ModelSource
from hf_epimer.pipeline.plan import CurvatureFile, PlannedModel
from hf_epimer.pipeline.recipe import MergeRecipe
from hf_epimer.tasks.dataset import Sampling, TaskImages, data_bytes, data_revision
from hf_epimer.tasks.task import Task


def with_curvature(
    recipe: MergeRecipe,
    needs: StatisticKind | None,
    asked_by: str,
    base: ModelSource,
    models: tuple[PlannedModel, ...],
    *,
    optional: bool = False,
    partly: bool = False,
) -> tuple[PlannedModel, ...]:
    """The models, each with where one of its statistics comes from.

    Args:
        needs: which one; None for none, which leaves the models as they are.
        asked_by: the method, for messages.
        optional: leave them as they are, too, when no files are given and not every model has one of its own.
        partly: leave those as they are for which there is no way to it.

    Raises:
        StatisticsError: there is no way to it, listing the ways and the methods that need none.
        UsageError: --fisher is of no use here, or its labels are not those of the models.
    """
    if needs is None:
        _refuse_unused(recipe, asked_by)
        return models
    given = _given_files(recipe, models, needs)
    curvature: dict[str, CurvatureFile | CurvatureRequest] = {}
    reasons = []
    for model in models:
        try:
            entry = given.get(model.label) or _find_curvature(recipe, needs, base, model)
        except (HubError, DataError) as error:  # its data cannot be reached; there are other ways
            entry = None
            reasons.append(f" (not on {model.task.dataset if model.task else model} now: {error})")
        if entry:
            curvature[model.label] = entry
    lacking = [str(model) for model in models if model.label not in curvature]
    if (
        optional
        and not recipe.fisher
        and (lacking or any(isinstance(entry, CurvatureRequest) for entry in curvature.values()))
    ):
        return models
    if lacking and not partly:
        raise StatisticsError(_no_way(needs, asked_by, base, lacking, "".join(reasons[:1])))
    return tuple(
        replace(model, curvature={**model.curvature, needs: curvature[model.label]})
        if model.label in curvature
        else model
        for model in models
    )


def with_images(
    recipe: MergeRecipe, purpose: str, base: ModelSource, models: Sequence[PlannedModel]
) -> tuple[PlannedModel, ...]:
    """The models, each with images of its task, those that curvature is estimated on, for another `purpose`.

    Raises:
        UsageError: a model's task is not known.
        StatisticsError: the base has no text tower to see images of that task with.
        HubError, DataError: a data set cannot be reached, or is not there.
    """
    seen = []
    for model in models:
        if model.task is None:
            raise UsageError(
                f"{model}: to {purpose}, its task must be known: label it (dtd={model.source.ref.location}) or add "
                "--task FILE"
            )
        check_head(model.source, base, model.task)
        data_revision(model.task)  # whether it can be reached is found out now
        seen.append(replace(model, images=_images(recipe, model.task)))
    return tuple(seen)


def _find_curvature(
    recipe: MergeRecipe, needs: StatisticKind, base: ModelSource, model: PlannedModel
) -> CurvatureFile | CurvatureRequest | None:
    """The file beside the weights or in the cache, else what is to be measured; None where that is not possible.

    Raises:
        HubError, DataError: the task's data cannot be reached.
    """
    if needs.file and needs.file.name in model.source.files:
        return CurvatureFile(model.source, needs.file.name)
    if model.task is None or not can_classify(model.source, base, model.task):
        return None
    request = CurvatureRequest(
        model.source, base, _images(recipe, model.task), Gradients(precision=recipe.mixed_precision)
    )
    if needs.file is None:
        return request
    path = request.cached(needs.file)
    return _curvature_file(ModelRef(str(path), label=model.label), needs) if path.is_file() else request


def _images(recipe: MergeRecipe, task: Task) -> TaskImages:
    size = data_bytes(task)
    return TaskImages(task, Sampling(recipe.samples, seed=recipe.seed, streaming=size > recipe.max_data * 1e9), size)


# --- --fisher -------------------------------------------------------------------------------------------------------


def _given_files(recipe: MergeRecipe, models: Sequence[PlannedModel], needs: StatisticKind) -> dict[str, CurvatureFile]:
    """--fisher references by the label of the model they belong to."""
    if recipe.fisher and needs.file is None:
        raise UsageError(f"--fisher: the {needs.title} is measured anew for every merge, no file can hold it")
    labelled = [ref for ref in recipe.fisher if ref.label]
    if labelled and len(labelled) < len(recipe.fisher):
        raise UsageError("--fisher: label all references (dtd=REF) or none of them")
    if not labelled:
        if recipe.fisher and len(recipe.fisher) != len(models):
            raise UsageError(f"--fisher: {len(models)} models but {len(recipe.fisher)} unlabelled references")
        labelled = [replace(ref, label=model.label) for ref, model in zip(recipe.fisher, models, strict=False)]
    labels = {model.label for model in models}
    given: dict[str, CurvatureFile] = {}
    for ref in labelled:
        if ref.label not in labels:
            raise UsageError(
                f"--fisher {ref}: no model is labelled {ref.label} (there are {', '.join(sorted(labels))})"
            )
        if ref.label in given:
            raise UsageError(f"--fisher: {ref.label} is given twice")
        given[str(ref.label)] = _curvature_file(ref, needs)
    return given


def _curvature_file(ref: ModelRef, needs: StatisticKind) -> CurvatureFile:
    """The file that a reference names, or that lies in the folder or repo that it names."""
    path = Path(ref.location)
    if ref.is_local and path.is_file():
        source = Source(ref, str(ref.label), frozenset({path.name}), {path.name: path.stat().st_size})
        return CurvatureFile(source, path.name)
    source = resolve(ref)
    name = needs.file.name if needs.file else ""
    if name not in source.files:
        raise NotFoundError(f"--fisher {ref}: there is no {name}")
    return CurvatureFile(source, name)


# --- complaints -----------------------------------------------------------------------------------------------------


def _refuse_unused(recipe: MergeRecipe, asked_by: str) -> None:
    if recipe.fisher:
        users = ", ".join(method.name for method in METHODS.values() if method.needs)
        raise UsageError(f"--fisher: {asked_by} uses no Fisher information; {users} do")


def _no_way(needs: StatisticKind, asked_by: str, base: ModelSource, lacking: Sequence[str], reason: str) -> str:
    """What can be done about curvature that cannot be had."""
    free = ", ".join(name for name, other in METHODS.items() if other.needs is None)
    ways = []
    if needs.file:
        ways.append(f"give it with --fisher, put {needs.file.name} beside the weights (hf-epimer fisher makes it)")
    zero_shot = base.architecture.zero_shot
    if zero_shot and not base.has_text_tower:
        full = zero_shot.model_class
        ways.append(f"name a full model ({full}) with --base so that it can be estimated (this one has no text tower)")
    elif zero_shot and not base.has_tokenizer:
        ways.append("name a base with its tokenizer so that it can be estimated (there is none beside this one)")
    else:
        with_head = "" if zero_shot else " with a head"
        ways.append(
            f"label the checkpoint with its task (dtd=REF), or add --task FILE{with_head}, so that it can be estimated"
        )
    return (
        f"{asked_by} needs the {needs.title} of {', '.join(lacking)}: {', '.join(ways)}"
        f"{reason}, or choose a method that needs no data: {free}"
    )
