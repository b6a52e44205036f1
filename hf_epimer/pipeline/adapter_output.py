"""A planned merge of adapters alone: to a merged adapter, or (`--dense`) folded into the base.

Both are one merge, written in two ways. Only a method that works on whole layers is not cut to a rank when the result
is dense and nobody asked for a rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hf_epimer.lora import Adapter, MergedUpdate, fold_updates, merge_adapters, works_in_core, write_adapter
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.report import LayerReport
from hf_epimer.merging.stream import MergedLayer, merge_layers
from hf_epimer.pipeline.plan import Plan

logger = logging.getLogger(__name__)

OnLayer = Callable[[str, int], None]


def write_merged_adapter(
    folder: Path,
    plan: Plan,
    ingredients: Ingredients,
    dtype: torch.dtype,
    note: Callable[[LayerReport], None],
    on_layer: OnLayer,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
        note: is told every layer's report.
        on_layer: as in `merge_layers`.
    """

    def noted(updates: Iterator[MergedUpdate]) -> Iterator[MergedUpdate]:
        for update in updates:
            note(update.report)
            yield update

    write_adapter(
        folder,
        noted(_updates(plan, ingredients, on_layer)),
        ingredients.base,
        module_name=plan.architecture.module_name,
        model_class=(plan.architecture.output_class, plan.architecture.library),
        base_name=plan.base.ref.location,
        base_revision=plan.base.ref.revision,
        dtype=dtype,
    )


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
        device=recipe.device,
        dtype=dtype,
        on_layer=on_layer,
    )


def _updates(plan: Plan, ingredients: Ingredients, on_layer: OnLayer) -> Iterator[MergedUpdate]:
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
