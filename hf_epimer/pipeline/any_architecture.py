"""Merging models of no family that is known here: without data, tensor by tensor, from shards into shards.

A matrix is read, merged and written while the next ones are on their way; what the mean merges goes in pieces; nothing
is held for longer. Under `accelerate launch` every process takes its share of the tensors of the same files.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_epimer.checkpoints.reader import (
    COUNTERS,
    FORMATS,
    WEIGHT_NAMES,
    Checkpoint,
    TensorSource,
    index_of,
    read_any_json,
)
from hf_epimer.checkpoints.writer import Layout, Shards, write_json
from hf_epimer.errors import CheckpointError, MismatchError, UsageError
from hf_epimer.merging.average import average
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.report import LayerReport
from hf_epimer.merging.stream import merge_layers
from hf_epimer.methods import METHODS, Method
from hf_epimer.models.any_architecture import Treatment, is_of_classes, treat
from hf_epimer.models.source import CONFIG, ModelSource
from hf_epimer.outside import leads_elsewhere
from hf_epimer.pipeline.plan import Plan
from hf_epimer.pipeline.processes import Processes
from hf_epimer.pipeline.recipe import MergeRecipe

logger = logging.getLogger(__name__)

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "modules.json",  # these four are how sentence-transformers makes one vector of a text
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
"""Files of a base that a merge of its models needs as they are."""

LARGEST_COPIED = 64 * 2**20
"""Bytes of one of them: the largest vocabularies have a quarter of a million tokens."""

_TYPES = {name: dtype for dtype, name in (FORMATS | COUNTERS).items()}


# --- plan -----------------------------------------------------------------------------------------------------------


def plan_treatment(recipe: MergeRecipe, method: Method, base: ModelSource, models: list[ModelSource]) -> Treatment:
    """Which rule every tensor of the base falls under, from configs and the headers of weight files alone.

    Raises:
        UsageError: something is asked for that needs data, or to know the family.
        MismatchError, CheckpointError: models that do not fit the base, or are quantised.
    """
    where = f"{base} is of no family that is known here ({base.architecture.name})"
    asked = {
        "--calibrate": recipe.calibrate,
        "--refine": recipe.refine,
        "--tune-alpha": recipe.tune_alpha,
        "--evaluate": recipe.evaluate,
        "--fisher": recipe.fisher,
    }
    for flag, value in asked.items():
        if value:
            raise UsageError(f"{where}: it merges without data, and {flag} is for families whose forward pass is known")
    for model in models:
        if model.is_adapter:
            raise UsageError(f"{where}: fold the adapter {model} into it first (PEFT's merge_and_unload)")
        if model.architecture.tag != base.architecture.tag:
            raise MismatchError(
                f"{model} is a {model.architecture.name}, the base {base.title} a {base.architecture.name}"
            )
    if method.statistic(recipe.options) and not method.does_without:
        data_free = [name for name, other in METHODS.items() if other.takes_any_model]
        raise UsageError(f"{where}: it merges without data, by {', '.join(data_free)}; {method.name} needs statistics")
    treatment = treat(base.config, base.tensors, {str(model): model.tensors for model in models}, recipe.skip)
    _warn_of_unlike_classes(treatment, models)
    return treatment


def _warn_of_unlike_classes(treatment: Treatment, models: list[ModelSource]) -> None:
    """One line where classifiers are averaged whose rows stand for other classes."""
    head = next(filter(is_of_classes, treatment.averaged), None)
    names = {json.dumps(model.config.get("id2label"), sort_keys=True) for model in models}
    if head and len(names) > 1:
        module = head.rpartition(".")[0]
        logger.warning(
            "the models' classes have other names (id2label), so that the mean of their classifiers says nothing; "
            "--skip '%s.*' leaves the base's", module,
        )  # fmt: skip


# --- read -----------------------------------------------------------------------------------------------------------


def open_any(plan: Plan) -> Ingredients:
    """All weights, opened and once more compared: what was fetched is what the headers promised.

    Raises:
        CheckpointError: a file is truncated, corrupt, or another than it was.
        MismatchError: a model is its own base.
    """
    assert plan.treatment
    base = _open(plan.base)
    models = [_open(model.source) for model in plan.models]
    for model in models:
        if all(name in model.shapes and _is_same(base, model, name) for name in plan.treatment.shapes):
            raise MismatchError(f"{model.label}: every tensor equals the base's; a model cannot be its own base")
    return Ingredients(base, models, plan.weights)


def _open(source: ModelSource) -> Checkpoint:
    checkpoint = Checkpoint(source.label, [source.fetch(name) for name in source.weight_files])
    if source.tensors != {name: (checkpoint.dtypes[name], shape) for name, shape in checkpoint.shapes.items()}:
        raise CheckpointError(f"{source}: its weight files hold other tensors than their headers said; merge again")
    return checkpoint


def _is_same(base: Checkpoint, model: Checkpoint, name: str) -> bool:
    """Whether two stored tensors are equal to the bit; no copy is made."""
    return base.dtypes[name] == model.dtypes[name] and torch.equal(base.tensor(name), model.tensor(name))


# --- write ----------------------------------------------------------------------------------------------------------


def write_any(
    folder: Path,
    plan: Plan,
    treatment: Treatment,
    ingredients: Ingredients,
    processes: Processes,
    on_layer: Callable[[str, int], None],
    note: Callable[[], None],
) -> tuple[LayerReport, ...]:
    """Merge into a folder: shards, their index, and the base's config, tokenizer and processor.

    Args:
        on_layer: called with "merge" or "survey" and 1 after every tensor.
        note: called after every tensor that has been written.

    Returns:
        What was done, tensor by tensor, by all processes.

    Raises:
        CheckpointError: NaN or Inf in an input, or a file of the base cannot be copied.
        NumericalError: a merged tensor is not finite, or does not fit into the type that is written.
        OutputError: the disk is full.
    """
    recipe = plan.recipe
    if processes.is_main:
        _write_beside(folder, plan.base, recipe.dtype)
    layout = _layout(treatment, recipe.dtype)
    mine = processes.share({name: layout[name][0].itemsize * _elements(layout[name][1]) for name in layout})
    reports: dict[str, LayerReport] = {}

    def done(name: str, report: LayerReport) -> None:
        reports[name] = replace(report, shape=layout[name][1])
        note()

    with Shards(folder, layout, weights=_whole(plan.base)) as shards:
        if processes.is_main:
            shards.create()
        processes.gather(None)
        by_method = Ingredients(
            _as_matrices(ingredients.base, treatment),
            [_as_matrices(model, treatment) for model in ingredients.models],
            ingredients.weights,
        )
        for layer in merge_layers(
            by_method,
            plan.method,
            recipe.options,
            seed=recipe.seed,
            exact=recipe.exact,
            device=processes.device(recipe.device),
            dtype=getattr(torch, recipe.dtype) if recipe.dtype else None,
            only=mine,
            team=processes,
            on_layer=on_layer,
        ):
            shards.write(layer.name, layer.tensor)
            done(layer.name, layer.report)
        for name in filter(mine.__contains__, treatment.averaged):
            names = [name if name in model.shapes else treatment.tied[name] for model in ingredients.models]
            write = partial(shards.write, name)
            done(name, average(ingredients, name, write, names=names, dtype=layout[name][0], exact=recipe.exact))
            on_layer("merge", 1)
        for name in filter(mine.__contains__, treatment.kept):
            shards.write(name, ingredients.base.tensor(name))
    everywhere = {name: report for part in processes.gather(reports) for name, report in part.items()}
    if processes.is_main:
        shards.write_index(written_elsewhere=layout.keys() - mine)
    return tuple(everywhere[name] for name in layout if name in everywhere)


def _as_matrices(source: TensorSource, treatment: Treatment) -> Checkpoint:
    assert isinstance(source, Checkpoint)  # as `open_any` opens them
    return source.reshaped(treatment.matrices)


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _whole(base: ModelSource) -> str:
    """What the base's one file of weights is, or would be, called."""
    return next(name for name in WEIGHT_NAMES if name in base.files or index_of(name) in base.files)


def _layout(treatment: Treatment, dtype: str | None) -> Layout:
    """Numbers in the type that is asked for, or else in their own; counters in their own."""
    layout = {}
    for name, (stored, shape) in treatment.stored.items():
        is_number = stored in FORMATS.values()
        layout[name] = (getattr(torch, dtype) if dtype and is_number else _TYPES[stored], shape)
    return layout


def _write_beside(folder: Path, base: ModelSource, dtype: str | None) -> None:
    """The config of the base, without where it once lay, and copies of its small files."""
    config: dict[str, Any] = {key: value for key, value in base.config.items() if key != "_name_or_path"}
    if dtype:
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    if "auto_map" in config:
        config["auto_map"] = _at_its_home(config["auto_map"], base)
    write_json(folder / CONFIG, config)
    for name in COPIED:
        if base.has(name):
            copy_file(base, name, folder)


def _at_its_home(auto_map: Any, base: ModelSource) -> Any:
    """Where a model's own code lies, which is neither run nor copied: transformers writes it `org/name--file.Class`."""
    logger.warning(
        "%s brings code of its own (auto_map in its config), which is neither run nor copied: %s", base,
        "copy it beside the merge" if base.ref.is_local else "who loads the merge with trust_remote_code gets it there",
    )  # fmt: skip
    if base.ref.is_local or not isinstance(auto_map, dict):
        return auto_map

    def at_home(place: Any) -> Any:
        if isinstance(place, list):  # of a tokenizer: the slow one and the fast one
            return [at_home(one) for one in place]
        return f"{base.ref.location}--{place}" if isinstance(place, str) and "--" not in place else place

    return {name: at_home(place) for name, place in auto_map.items()}


def copy_file(base: ModelSource, name: str, folder: Path) -> None:
    """Copy one of a base's small files into a folder.

    Raises:
        CheckpointError: it is too large, no JSON although its name says so, or a link to a file elsewhere.
    """
    path = base.fetch(name)
    places = [path, *path.parents[: name.count("/")]]
    if base.ref.is_local and any(map(leads_elsewhere, places)):
        raise CheckpointError(f"{base}: {name} is a link out of the folder, to {path.resolve()}: put the file there")
    if not path.is_file() or path.stat().st_size > LARGEST_COPIED:
        raise CheckpointError(f"{base}: {name} is no file of at most {LARGEST_COPIED} bytes")
    if name.endswith(".json"):
        read_any_json(path, str(base), LARGEST_COPIED)
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(path, folder / name)
