"""The merged weights of a plan, as a folder that transformers or PEFT loads: a full checkpoint or an adapter.

Adapters alone are merged to an adapter, or (`--dense`) to the same update folded into their base. Only a method that
works on whole layers is not cut to a rank when the result is dense and nobody asked for a rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.checkpoints.writer import write_json, write_tensors
from hf_epimer.lora import Adapter, MergedUpdate, fold_updates, merge_adapters, works_in_core, write_adapter
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.report import LayerReport
from hf_epimer.merging.stream import MergedLayer, merge_layers
from hf_epimer.models.trained_head import TrainedHead, heads_of, write_heads
from hf_epimer.pipeline.any_architecture import write_any
from hf_epimer.pipeline.full_model import write_full
from hf_epimer.pipeline.plan import Plan
from hf_epimer.pipeline.processes import launched
from hf_epimer.pipeline.report import RefinementReport
from hf_epimer.pipeline.usage import Usage
from hf_epimer.types import Progress

logger = logging.getLogger(__name__)

PROCESSOR = "preprocessor_config.json"

OnLayer = Callable[[str, int], None]
Merged = TypeVar("Merged", MergedLayer, MergedUpdate)


def write_merge(
    folder: Path, plan: Plan, ingredients: Ingredients, usage: Usage, progress: Progress
) -> tuple[tuple[LayerReport, ...], RefinementReport | None]:
    """Merge layer by layer into a folder.

    Args:
        usage: is shown the memory that is held after every layer.

    Returns:
        What was done, layer by layer, and what a refinement has brought, where that is asked for.

    Raises:
        CheckpointError, StatisticsError: NaN or Inf in an input, negative statistics.
        NumericalError: a merged layer is not finite, or does not fit into the type that is written.
        DataError: what is wrong with the images of a task that the merge is calibrated or refined on.
        OutputError: the disk is full, or PEFT cannot express the result.
    """
    reports: list[LayerReport] = []

    def noted(merged: Iterable[Merged]) -> Iterator[Merged]:
        for each in merged:
            reports.append(each.report)
            usage.note_memory()
            yield each

    def on_layer(stage: str, done: int) -> None:
        progress("merging" if stage == "merge" else "surveying", done, len(plan.shapes))

    progress("merging", 0, len(plan.shapes))
    if plan.treatment:
        return write_any(folder, plan, plan.treatment, ingredients, launched(), on_layer, usage.note_memory), None
    if plan.has_heads and launched().is_main:
        write_heads(folder, _heads(plan))
    if plan.writes_adapter:
        made: Iterable[MergedUpdate] = _updates(plan, ingredients, on_layer)
        refinement = None
        if plan.recipe.refine:
            from hf_epimer.pipeline.refinement.layers import refined_updates

            made, refinement = refined_updates(made, plan, ingredients, progress)
        updates = noted(made)
        _by_the_first(updates, lambda: _write_adapter(folder, plan, ingredients, updates))
        return tuple(reports), refinement
    dtype = dtype_of(plan, ingredients.base)
    layers: Iterator[MergedLayer] = dense_layers(plan, ingredients, dtype, on_layer)
    if plan.recipe.calibrate:
        from hf_epimer.pipeline.calibration.layers import calibrated_layers

        layers = calibrated_layers(layers, plan, ingredients, progress)
    refinement = None
    if plan.recipe.refine:
        from hf_epimer.pipeline.refinement.layers import refined_layers

        refined, refinement = refined_layers(layers, plan, ingredients, progress)
        layers = iter(refined)
    written = noted(layers)
    _by_the_first(written, lambda: _write_checkpoint(folder, plan, dtype, written))
    return tuple(reports), refinement


def _by_the_first(merged: Iterator[Merged], write: Callable[[], None]) -> None:
    """What all processes have made is written by the first; then all go on.

    Each makes every layer: what takes long, passes over images, has been shared out before.
    """
    processes = launched()
    if processes.is_main:
        write()
    else:
        for _ in merged:
            pass
    processes.gather(None)


def dense_layers(plan: Plan, ingredients: Ingredients, dtype: torch.dtype, on_layer: OnLayer) -> Iterator[MergedLayer]:
    """Every merged parameter, for full checkpoints and for adapters that are folded into their base."""
    recipe = plan.recipe
    if plan.only_adapters and (recipe.out_rank or works_in_core(plan.method, recipe.options)):
        return fold_updates(_updates(plan, ingredients, on_layer), ingredients.base, dtype)
    return merge_layers(
        ingredients,
        plan.method,
        recipe.options,
        seed=recipe.seed,
        exact=recipe.exact,
        device=launched().device(recipe.device),
        dtype=dtype,
        on_layer=on_layer,
    )


def dtype_of(plan: Plan, base: TensorSource) -> torch.dtype:
    """The type that a full checkpoint is written in: the one asked for, else that of the base."""
    if plan.recipe.dtype:
        return getattr(torch, plan.recipe.dtype)
    dtype = base.tensor(next(iter(base.shapes))).dtype
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32


def _updates(plan: Plan, ingredients: Ingredients, on_layer: OnLayer) -> Iterator[MergedUpdate]:
    """What the merged adapter adds to every parameter that it changes."""
    recipe = plan.recipe
    if recipe.device != "cpu":
        logger.warning("--device %s is left alone: adapters are merged in small matrices, on the CPU", recipe.device)
    return merge_adapters(
        [model for model in ingredients.models if isinstance(model, Adapter)],
        plan.method,
        recipe.options,
        weights=ingredients.weights,
        statistics=ingredients.statistics,
        bases=ingredients.bases,
        out_rank=recipe.out_rank,
        seed=recipe.seed,
        exact=recipe.exact,
        on_layer=on_layer,
    )


# --- files ----------------------------------------------------------------------------------------------------------


def _write_adapter(folder: Path, plan: Plan, ingredients: Ingredients, updates: Iterable[MergedUpdate]) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    write_adapter(
        folder,
        updates,
        ingredients.base,
        module_name=partial(plan.architecture.module_name, module_prefix=plan.output.module_prefix),
        model_class=(plan.output.output_class, plan.architecture.library),
        base_name=plan.base.ref.location,
        base_revision=plan.base.ref.revision,
        dtype=getattr(torch, plan.recipe.dtype or "float32"),
    )


def _write_checkpoint(folder: Path, plan: Plan, dtype: torch.dtype, layers: Iterable[MergedLayer]) -> None:
    """Safetensors, config.json and the image processor of the base."""
    settings = plan.base.processor_config()  # what is wrong with them is said before the first layer is merged
    if settings is None:
        logger.warning("%s has no %s; the merged model has none either", plan.base, PROCESSOR)
    else:
        write_json(folder / PROCESSOR, settings)  # anew, for it may be published
    if plan.recipe.full:
        write_full(folder, plan, dtype, layers)
        return
    write_tensors(folder, plan.shapes, dtype, ((layer.name, layer.tensor) for layer in layers))
    write_json(folder / "config.json", _config(plan, dtype))


def _heads(plan: Plan) -> dict[str, TrainedHead]:
    """The classifiers of all models, by label; where a label is taken already, by the model that brings the second."""
    found: dict[str, TrainedHead] = {}
    for model in plan.models:
        for label, head in heads_of(model.source, plan.architecture, model.task).items():
            found[f"{model.label}-{label}" if label in found else label] = head
    return found


def _config(plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    base, output = plan.base.config, plan.output
    section = plan.architecture.model_types[output.output_type]
    vision = dict(plan.base.vision_config)
    kind = plan.architecture.classification
    return {
        "architectures": [output.output_class],
        "model_type": output.output_type,
        **({section: vision} if section else vision),
        **({"id2label": {}, "label2id": {}} if kind and output.output_class == kind.trained_class else {}),
        **{field: base[field] for field in plan.architecture.carried if isinstance(base.get(field), int)},
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # the name before transformers 5
    }
