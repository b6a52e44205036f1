"""Everything that a plan reads: fetched, statistics estimated where there are none, opened and compared.

Names, shapes and types are compared with the base's config before any weight is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from hf_epimer.checkpoints.reader import Checkpoint, StateDict, TensorSource
from hf_epimer.curvature.files import open_statistics
from hf_epimer.curvature.origin import other_origin
from hf_epimer.curvature.request import CurvatureRequest
from hf_epimer.errors import MismatchError
from hf_epimer.hub.source import Source, fetch_all
from hf_epimer.lora import read_adapter
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.stream import tagged_bases
from hf_epimer.methods.statistic import POSITIONS, PROJECTED_FISHER, StatisticKind, StatisticsFile
from hf_epimer.models.trained_head import is_classifier
from hf_epimer.pipeline.any_architecture import open_any
from hf_epimer.pipeline.plan import CurvatureFile, Plan
from hf_epimer.types import Progress

logger = logging.getLogger(__name__)


def fetch(plan: Plan, progress: Progress, more: Sequence[str] = ()) -> None:
    """Bring weights and statistics that are on the Hub into the cache, and check them.

    Args:
        more: names of other files of the base, as far as it has them.
    """
    files: list[tuple[Source, str]] = [(plan.base, name) for name in plan.base.weight_files] if plan.reads_base else []
    files += [(model.source, name) for model in plan.models for name in model.source.weight_files]
    files += [(model.source, name) for model in plan.models for name in model.source.head_files]
    files += [(file.source, file.name) for file in plan.measured]
    files += [(plan.base, name) for name in more if name in plan.base.files]
    remote = [(source, name) for source, name in files if not source.ref.is_local]
    size = sum(source.sizes.get(name, 0) for source, name in remote)
    progress("fetching", 0, size)
    fetch_all(remote, lambda done: progress("fetching", done, size))


def open_inputs(plan: Plan, progress: Progress) -> Ingredients:
    """Open all weights and statistics; each task's estimate is kept in the cache as soon as it is done.

    Raises:
        MismatchError, CheckpointError, StatisticsError: something is damaged or does not fit.
    """
    if plan.treatment:
        return open_any(plan)
    ingredients = _open_weights(plan)
    _measure_files(plan, progress)
    if plan.recipe.calibrate:
        ingredients = replace(ingredients, curvature=_open_curvature(plan, POSITIONS))
    if plan.statistic is None:
        return ingredients
    if plan.statistic is PROJECTED_FISHER:
        return _with_projected_fisher(plan, ingredients, progress)
    return replace(ingredients, statistics=_open_curvature(plan, plan.statistic))


def _measure_files(plan: Plan, progress: Progress) -> None:
    """Put into the cache what is to be estimated, all files of one model in one pass over its images."""
    by_model: dict[CurvatureRequest, list[StatisticsFile]] = {}
    for kind, request in plan.to_estimate:
        if kind.file:
            by_model.setdefault(request, []).append(kind.file)
    if not by_model:
        return
    from hf_epimer.curvature.estimate import estimate_files

    step = _announced(by_model, progress)
    for request, files in by_model.items():
        estimate_files(request, files, on_samples=step)


def _open_curvature(plan: Plan, kind: StatisticKind) -> list[TensorSource]:
    """One file of statistics per model, opened."""
    assert kind.file is not None
    opened: list[TensorSource] = []
    for model in plan.models:
        entry = model.curvature.get(kind)
        if entry is None:  # the method does without it for this task
            opened.append(StateDict(model.label, {}))
            continue
        path = entry.cached(kind.file) if isinstance(entry, CurvatureRequest) else entry.fetch()
        label = f"{kind.title} of {model.label} ({path.name})"
        source = open_statistics(path, label, kind, plan.shapes, plan.architecture.canonical)
        if isinstance(entry, CurvatureFile) and (other := other_origin(path, model.source, model.task)):
            used_for = f"{model.source}, task {model.task.name}" if model.task else str(model.source)
            logger.warning("%s: it was measured on %s, and is used for %s", label, other, used_for)
        if not any(bool(source.tensor(name).any()) for name in source.shapes):
            logger.warning("%s: zero everywhere, so that it says nothing about the model", label)
        opened.append(source)
    return opened


def _with_projected_fisher(plan: Plan, ingredients: Ingredients, progress: Progress) -> Ingredients:
    """The Fisher information of every model on the tagged bases of this very merge, always estimated now."""
    from hf_epimer.curvature.estimate import project_fisher

    requests = [request for kind, request in plan.to_estimate if kind is PROJECTED_FISHER]
    step = _announced(requests, progress)
    bases = tagged_bases(ingredients, plan.recipe.options.rank, seed=plan.recipe.seed, exact=plan.recipe.exact)
    projected = [
        StateDict(f"{PROJECTED_FISHER.title} of {model.label}", project_fisher(request, bases, on_samples=step))
        for model, request in zip(plan.models, requests, strict=True)
    ]
    return replace(ingredients, statistics=projected, bases=bases)


def _announced(requests: Iterable[CurvatureRequest], progress: Progress) -> Callable[[int], None]:
    """A stage of its own for what is to be estimated: takes the number of samples done."""
    total = sum(request.images.sampling.samples or 0 for request in requests)
    progress("estimating curvature", 0, total)
    return lambda count: progress("estimating curvature", count, total)


def _open_weights(plan: Plan) -> Ingredients:
    base: TensorSource = _open_base(plan) if plan.reads_base else _BaseOnDemand(plan)
    models: list[TensorSource] = []
    for model in plan.models:
        if model.source.is_adapter:
            kept = plan.architecture.is_classifier if plan.has_heads else None
            adapter = read_adapter(model.source.folder(), base, plan.architecture.canonical, model.label, kept=kept)
            if adapter.is_zero():
                raise MismatchError(f"{model.label}: its adapter is zero: there is nothing to merge")
            models.append(adapter)
        else:
            checkpoint = model.source.open(plan.shapes)
            is_kept = is_classifier(model.source, plan.architecture)
            if not is_kept and any(map(plan.architecture.is_classifier, checkpoint.left_out)):
                logger.warning("%s: its classifier is left out; what is merged is the vision tower", model.label)
            _check_not_the_base(base, checkpoint)
            models.append(checkpoint)
    return Ingredients(base, models, plan.weights)


def _open_base(plan: Plan) -> Checkpoint:
    base = plan.base.open(plan.shapes)
    base.label = str(replace(plan.base.pinned, label=None))
    base.shapes = {name: base.shapes[name] for name in plan.shapes}  # in the order of the model, not of the file
    return base


class _BaseOnDemand:
    """A `TensorSource` over the base that is fetched and opened with its first tensor, if ever: its config has told the
    shapes, and only parameters that an adapter replaces are read."""

    def __init__(self, plan: Plan) -> None:
        self.label = str(replace(plan.base.pinned, label=None))
        self.shapes = plan.shapes
        self._opened = cache(lambda: _open_base(plan))

    def tensor(self, name: str) -> Tensor:
        return self._opened().tensor(name)

    def copy_to(self, name: str, out: Tensor) -> None:
        self._opened().copy_to(name, out)


def _check_not_the_base(base: TensorSource, model: TensorSource) -> None:
    """A copy of the base under another name; any real fine-tuned model differs in the first tensor compared."""
    if all(torch.equal(model.tensor(name).float(), base.tensor(name).float()) for name in base.shapes):
        raise MismatchError(f"{model.label}: every tensor equals the base's; a model cannot be its own base")
