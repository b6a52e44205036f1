"""What a merge may be made of: models that fit each other and their base, and options that fit the models."""

from __future__ import annotations

import filecmp
import logging
from collections.abc import Sequence

import torch

from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.errors import MismatchError, UsageError
from hf_epimer.lora import read_adapter
from hf_epimer.methods import Method
from hf_epimer.models.base import check_same_architecture
from hf_epimer.models.head import check_head
from hf_epimer.models.source import ModelSource
from hf_epimer.models.trained_head import is_classifier
from hf_epimer.pipeline.eval_results import benchmarks
from hf_epimer.pipeline.full_model import check_full
from hf_epimer.pipeline.plan import Plan, PlannedModel
from hf_epimer.pipeline.recipe import MergeRecipe

logger = logging.getLogger(__name__)


def check_models(recipe: MergeRecipe, method: Method, base: ModelSource, models: Sequence[PlannedModel]) -> None:
    """Refuse models that are unlike the base, or the base itself, and options that do not fit what is merged.

    Raises:
        UsageError: an option that adapters, full checkpoints or this method do not have.
        MismatchError: two architectures, or a model that is its own base.
        CheckpointError: the base has no weights that may be read.
        StatisticsError: accuracy is to be measured, and there is nothing to classify with.
    """
    full = [model.source for model in models if not model.source.is_adapter]
    for model in models:
        if recipe.evaluate and model.task:
            check_head(model.source, base, model.task)
    if recipe.out_rank is not None and full:
        raise UsageError(f"--out-rank is of merged adapters, and {full[0]} is a full checkpoint")
    benchmarks(recipe.eval_results, [model.task for model in models if model.task])
    check_same_architecture(base, full)
    check_distinct(base, models)
    if recipe.refine or not writes_adapter(recipe, models):
        base.check_readable()
    if recipe.skip:
        raise UsageError(f"--skip is for models of no family that is known here; {base} is a {base.architecture.name}")
    if recipe.calibrate and writes_adapter(recipe, models):
        raise UsageError("--calibrate solves whole layers again, which no adapter can hold: add --dense")
    if recipe.full and writes_adapter(recipe, models):
        raise UsageError("--full writes a whole model, and the result is an adapter: add --dense")
    if recipe.full:
        has_heads = any(is_classifier(model.source, base.architecture) or model.source.head_files for model in models)
        check_full(base, has_heads)
    if recipe.tune_alpha and "alpha" not in method.options:
        raise UsageError(f"--tune-alpha: {method.name} has no alpha")
    if recipe.tune_alpha and writes_adapter(recipe, models):
        raise UsageError("--tune-alpha puts whole layers into a model: for adapters add --dense")


def check_distinct(base: ModelSource, models: Sequence[PlannedModel]) -> None:
    """Refuse the base among the models; warn of one that is there twice.

    Raises:
        MismatchError: a model is its own base.
    """
    seen: dict[str, PlannedModel] = {}
    for model in models:
        identity = model.source.identity
        if identity == base.identity:
            raise MismatchError(f"{model} is its own base: it has nothing to merge; name its real base with --base")
        if identity in seen:
            logger.warning("%s is merged twice (as %s and %s)", model.source.title, seen[identity].label, model.label)
        elif twin := next((other for other in seen.values() if _same_weights(other.source, model.source)), None):
            logger.warning("%s and %s have the same weights under two names", twin, model)
        seen[identity] = model


def _same_weights(one: ModelSource, other: ModelSource) -> bool:
    """Whether two models have the same weight files, as far as that is known without reading all of them."""
    pairs = list(zip(_weights(one), _weights(other)))
    if not pairs or len(_weights(one)) != len(_weights(other)):
        return False
    if one.ref.is_local and other.ref.is_local:  # other weights differ in the first few kilobytes
        try:
            return all(filecmp.cmp(one.fetch(name), other.fetch(twin), shallow=False) for name, twin in pairs)
        except OSError:  # whoever reads the weights says what is wrong with them
            return False
    known = [(one.sha256.get(name), other.sha256.get(twin)) for name, twin in pairs]
    return all(sha256 is not None and sha256 == twin for sha256, twin in known)


def _weights(source: ModelSource) -> list[str]:
    return [name for name in source.weight_files if name.endswith(".safetensors")]


def writes_adapter(recipe: MergeRecipe, models: Sequence[PlannedModel]) -> bool:
    """Whether the result is an adapter: of adapters alone, unless a full checkpoint is asked for."""
    return all(model.source.is_adapter for model in models) and not recipe.dense


def check_weights(plan: Plan) -> None:
    """Compare what lies on this machine already with what the base's config promises; the rest is compared later.

    Raises:
        CheckpointError, MismatchError: it does not fit, or the base has no weights that may be read and is to be read.
    """
    read = [model.source for model in plan.models if not model.source.is_adapter]
    if plan.reads_base:
        plan.base.check_readable()
        read.insert(0, plan.base)
    for source in read:
        if source.ref.is_local:
            source.open(plan.shapes)
    promised = StateDict("base", {name: torch.empty(shape, device="meta") for name, shape in plan.shapes.items()})
    for model in plan.models:
        if model.source.is_adapter and model.source.ref.is_local:
            read_adapter(model.source.folder(), promised, plan.architecture.canonical, model.label, quiet=True)
