"""Merging models in memory: tensors of any architecture in, tensors out; no files, no Hub.

`merge_state_dicts` takes names as they are. `merge_models`, behind `EpiMerConfig(...).merge(...)`, also takes modules
and statistics files, and knows the layouts in which transformers names the tensors of one vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_epimer.checkpoints.reader import StateDict, TensorSource
from hf_epimer.errors import StatisticsError, UsageError
from hf_epimer.merging.compact import expanded
from hf_epimer.merging.inputs import Ingredients, check_shapes, normalized_weights
from hf_epimer.merging.stream import merge_layers
from hf_epimer.methods import DEFAULT_METHOD, find_method, method_of
from hf_epimer.methods.statistic import StatisticKind, split_name
from hf_epimer.numerics.subspace import TaggedBasis
from hf_epimer.types import Shape


def merge_state_dicts(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    method: str | None = None,
    config: Any = None,
    statistics: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    bases: Mapping[str, TaggedBasis] | None = None,
    weights: Sequence[float] | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    exact: bool = False,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Merge models in memory, of any architecture: two-dimensional parameters are matrices, the rest is not.

    Args:
        base: name -> W_0.
        tuned: one mapping per task with the names and shapes of `base`, any floating dtype.
        method: a name from METHODS; None for the one that `config` belongs to, or `epimer-core`.
        config: an instance of that method's config dataclass; its defaults for None.
        statistics: one mapping per task: Fisher diagonals (shaped like the parameters; `epimer` can do without those
            of non-matrices) for `epimer`, `fisher` and `gradient-matching`, Gram matrices (n x n) for `regmean`;
            for other metrics of `epimer`, tensors named as the table in
            `hf_epimer.methods.statistic` says. One with a single part may go by the parameters' names.
        bases: where statistics were taken in a tagged basis, that basis by parameter (`tagged_bases`).
        weights: l_t, normalised to sum to 1.
        labels: unique task names; only random masks depend on them.
        seed, exact, device: as in `merge_layers`.

    Returns:
        name -> merged tensor, in the dtype of the base.

    Raises:
        UsageError: unknown method, wrong config, unusable weights.
        MismatchError: unlike names or shapes.
        StatisticsError: statistics missing or unusable.
    """
    chosen = find_method(method or DEFAULT_METHOD) if method or config is None else method_of(config)
    config = chosen.config() if config is None else config
    if not isinstance(config, chosen.config):
        raise UsageError(f"{chosen.name} takes a {chosen.config.__name__}, not a {type(config).__name__}")
    if not tuned:
        raise UsageError("there is nothing to merge: give at least one fine-tuned model")
    names = list(labels) if labels is not None else [f"model {index}" for index in range(len(tuned))]
    if len(names) != len(tuned) or len(set(names)) != len(names):
        raise UsageError(f"labels must be {len(tuned)} different names, not {names}")
    mergeable = {name: tensor for name, tensor in base.items() if tensor.is_floating_point() and tensor.numel()}
    source = StateDict("base", mergeable)
    models = [StateDict(label, tensors) for label, tensors in zip(names, tuned, strict=True)]
    everything = StateDict("base", base).shapes
    for model in models:
        check_shapes(everything, model, "the checkpoint")
    measured = None
    needs = chosen.statistic(config)
    if needs and statistics is None and not chosen.does_without:
        raise StatisticsError(f"{chosen.name} needs {needs} statistics, one mapping per model")
    if needs and statistics is not None:
        if len(statistics) != len(models):
            raise StatisticsError(f"{len(models)} models but {len(statistics)} sets of statistics")
        measured = [
            _statistics(needs, label, given, everything) for label, given in zip(names, statistics, strict=True)
        ]
    ingredients = Ingredients(source, models, normalized_weights(weights, len(models)), measured, bases or {})
    merged = {
        layer.name: layer.tensor
        for layer in merge_layers(ingredients, chosen, config, seed=seed, exact=exact, device=device)
    }
    return {name: merged.get(name, tensor) for name, tensor in base.items()}  # counters and the like stay the base's


def _statistics(
    kind: StatisticKind, label: str, given: Mapping[str, Tensor], parameters: Mapping[str, Shape]
) -> TensorSource:
    """One model's statistics under the names that they have in files.

    Raises:
        MismatchError: a tensor is of no parameter, or of another shape than the parameter asks for.
    """
    if len(kind.parts) == 1:
        suffix = kind.parts[0].suffix
        given = {name + suffix if name in parameters else name: tensor for name, tensor in given.items()}
    source = expanded(StateDict(label, given), parameters)
    known = {name: shape for name, shape in source.shapes.items() if split_name(name)[0] in parameters}
    checked = {name: shape for name, shape in kind.shapes(parameters).items() if name in known}
    check_shapes(known | checked, source, f"its {kind.title}")
    return source
