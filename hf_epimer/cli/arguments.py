"""From the words of a command to the recipe of the merge that it looks into."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from hf_epimer.errors import UsageError

if TYPE_CHECKING:
    from hf_epimer.pipeline.recipe import MergeRecipe


def recipe_of(namespace: argparse.Namespace, command: str, **more: Any) -> MergeRecipe:
    """Checkpoints, base, weights, statistics and tasks of `diagnose` and `sweep`, with `more` fields beside them."""
    from hf_epimer.hub.refs import ModelRef
    from hf_epimer.pipeline.recipe import MergeRecipe

    if not namespace.models:
        raise UsageError(f"give the checkpoints, before flags that take several values: hf-epimer {command} REF REF")
    return MergeRecipe(
        models=tuple(map(ModelRef.parse, namespace.models)),
        base=ModelRef.parse(namespace.base) if namespace.base else None,
        weights=tuple(namespace.weights) if namespace.weights else None,
        fisher=tuple(map(ModelRef.parse, namespace.fisher)),
        overwrite=namespace.overwrite,
        tasks=tuple(namespace.task),
        **more,
    )
