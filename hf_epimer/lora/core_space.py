"""Adapters to one merged adapter, one layer at a time, without forming their m x n task vectors.

    D_t = U_ref M_t V_ref^T (lossless)  ->  M = method(M_1 .. M_T), a layer of its own  ->  U_ref M V_ref^T, cut to R

Methods that commute with rotations of both sides (EpiMer under Kronecker curvature, TSV-M, Iso-C, the means) give in
the core what they give on the whole layer; TIES and DARE look at single entries, and there it is the core's entries
they look at, as in KnOTS (Stoica et al., ICLR 2025). Methods with a metric on a layer's inputs (`epimer-core`, RegMean)
have a core on the side of the outputs, U_ref^T D_t, p x n, and give there what they give on the whole layer, too. One
that needs the layer itself (a Fisher diagonal) gets it, and its result is factorised. The core is padded with zeros to
T max r_t, so that rank caps per task are those of the whole layer; Iso's mean singular value is over these directions,
not over min(m, n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.errors import MismatchError, StatisticsError, UsageError
from hf_epimer.lora.adapter import Adapter
from hf_epimer.merging.finite import check_merged, check_statistics
from hf_epimer.merging.inputs import Ingredients, normalized_weights
from hf_epimer.merging.report import AdapterReport, LayerReport
from hf_epimer.merging.stream import stream_layers
from hf_epimer.methods import Layer, LayerMerge, Method
from hf_epimer.methods.statistic import KRONECKER, StatisticKind
from hf_epimer.numerics.lowrank import LowRank, UnionCore, factorize, outputs_core, union_core
from hf_epimer.numerics.subspace import TaggedBasis
from hf_epimer.types import Shape


@dataclass(frozen=True)
class MergedUpdate:
    """What the merged adapter adds to one parameter: a low-rank matrix (folded), or a whole tensor of its shape."""

    name: str
    shape: Shape
    update: LowRank | Tensor
    report: LayerReport


def merge_adapters(
    adapters: Sequence[Adapter],
    method: Method,
    config: Any,
    *,
    weights: Sequence[float] | None = None,
    statistics: Sequence[TensorSource] | None = None,
    bases: Mapping[str, TaggedBasis] | None = None,
    out_rank: int | None = None,
    seed: int = 0,
    exact: bool = False,
    on_layer: Callable[[str, int], None] = lambda stage, layers: None,
) -> Iterator[MergedUpdate]:
    """Merge every parameter that an adapter changes, in the order of the base.

    Args:
        adapters: of one base, with unique labels.
        method: from METHODS.
        config: an instance of `method.config`.
        weights: l_t, normalised to sum to 1.
        statistics: one per adapter, tensors named as the table in `hf_epimer.methods.statistic` says.
        bases: where statistics were taken in a tagged basis, that basis by parameter (`tagged_bases`).
        out_rank: largest rank of the result; None for min(sum r_t, m, n) of each layer, which holds any core.
        seed: of everything random.
        exact: float64, full decompositions and dense solves also for whole layers; cores always have them.
        on_layer: called with the stage ("survey" or "merge") and 1 after every layer.

    Raises:
        UsageError: unusable weights or rank.
        StatisticsError: the method needs statistics that are not there.
        NumericalError: a merged update is not finite.
    """
    if out_rank is not None and out_rank < 1:
        raise UsageError(f"--out-rank must be at least 1, not {out_rank}")
    if any(adapter.base.shapes != adapters[0].base.shapes for adapter in adapters):
        raise MismatchError("the adapters belong to different bases: adapters are merged over one base")
    needs = method.statistic(config)
    if needs and statistics is None and not method.does_without:
        raise StatisticsError(f"{method.name} needs {needs} statistics of every adapter, or other options")
    ingredients = Ingredients(
        adapters[0].base,
        adapters,
        normalized_weights(weights, len(adapters)),
        statistics if needs else None,
        bases or {},
    )
    through_core = works_in_core(method, config)

    def core_layers() -> Iterator[tuple[Layer, UnionCore | None]]:
        if method.core == "both":
            return _core_layers(ingredients, adapters, union_core, needs, seed)
        return _core_layers(ingredients, adapters, outputs_core, needs, seed, exact)

    def over_layers(work: Callable[[Layer], Any], step: int = 1, stage: str = "survey") -> Iterable[Any]:
        results: Iterator[Any]
        if through_core:
            results = (work(layer) for layer, _ in core_layers())
        else:
            results = stream_layers(ingredients, work, needs, seed=seed, exact=exact)
        for result in results:
            yield result
            on_layer(stage, 1)

    survey = method.survey(config, over_layers) if method.survey else None
    if not through_core:
        changed = {name for adapter in adapters for name in adapter.changed}
        whole = over_layers(lambda layer: _whole(layer, adapters, method, config, survey, out_rank), stage="merge")
        yield from (merged for merged in whole if merged.name in changed)
        return
    for layer, core in core_layers():
        yield _merged(layer, core, adapters, method, config, survey, out_rank)
        on_layer("merge", 1)


def works_in_core(method: Method, config: Any) -> bool:
    """Whether adapters are merged in the core that they span; if not, their whole layers are."""
    if method.core == "both":
        return method.statistic(config) in (None, KRONECKER)
    return method.core == "outputs"


# --- layers ---------------------------------------------------------------------------------------------------------


def _core_layers(
    ingredients: Ingredients,
    adapters: Sequence[Adapter],
    make_core: Callable[[Sequence[LowRank]], UnionCore],
    needs: StatisticKind | None,
    seed: int,
    exact: bool = True,  # a core on both sides is small: decompose it fully
) -> Iterator[tuple[Layer, UnionCore | None]]:
    """Every changed parameter as a layer of its own: a matrix by its core, anything else by its task vectors."""
    changed = {name for adapter in adapters for name in adapter.changed}
    dtype = torch.float64 if exact else torch.float32
    common: dict[str, Any] = {
        "weights": torch.tensor(ingredients.weights, dtype=dtype),
        "labels": tuple(adapter.label for adapter in adapters),
        "seed": seed,
        "exact": exact,
    }
    for name, shape in ingredients.base.shapes.items():
        if name not in changed:
            continue
        if len(shape) < 2:
            task_vectors = torch.empty(len(adapters), *shape, dtype=dtype)
            for adapter, values in zip(adapters, task_vectors, strict=True):
                adapter.task_vector_to(name, values)
            base = ingredients.base.tensor(name).to(dtype)
            yield Layer(name, base, task_vectors, is_matrix=False, **common), None
            continue
        points = [adapter.low_rank(name) for adapter in adapters]
        if not any(point.rank for point in points):
            continue
        core = _padded(make_core(points), points)
        cores = core.cores().to(dtype)
        statistics = _curvature(ingredients.statistics or (), needs, name, core, dtype) if needs else {}
        if needs is KRONECKER and not statistics:
            raise StatisticsError(f"{name}: there are no Kronecker factors for this weight, which adapters change")
        yield (
            Layer(
                name,
                torch.zeros_like(cores[0]),
                cores,
                is_matrix=core.right is not None or len(shape) == 2,
                statistics=statistics,
                factors=core.points,
                **common,
            ),
            core,
        )


def _padded(core: UnionCore, points: Sequence[LowRank]) -> UnionCore:
    """The core with coordinates of zeros up to T max r_t (as far as the matrices have so many rows and columns)."""
    wanted = len(points) * max(point.rank for point in points)

    def grown(side: Tensor | None, inside: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        if side is None:
            return None, list(inside)
        more = min(wanted, len(side)) - side.shape[1]
        return pad(side, (0, more)), [pad(matrix, (0, 0, 0, more)) for matrix in inside]

    left, us = grown(core.left, [x.u for x in core.points])
    right, vs = grown(core.right, [x.v for x in core.points])
    assert left is not None
    return UnionCore(left, right, tuple(LowRank(u, x.s, v) for u, x, v in zip(us, core.points, vs)))


def _curvature(
    statistics: Sequence[TensorSource], needs: StatisticKind, name: str, core: UnionCore, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Second moments in core coordinates: V_ref^T A_t V_ref of inputs and U_ref^T S_t U_ref of outputs."""
    moments: dict[str, Tensor] = {}
    for part in needs.parts:
        basis, stored = core.left if part.name == "output" else core.right, name + part.suffix
        size = len(basis if basis is not None else core.points[0].v)
        present = [source for source in statistics if stored in source.shapes]
        if not present:
            return {}
        if len(present) < len(statistics) and not part.is_optional:
            lacking = next(source for source in statistics if source not in present)
            raise StatisticsError(f"{lacking.label}: no statistics for {stored}")
        projected = []
        for source in statistics:
            if source not in present:
                projected.append(torch.zeros(size, size, dtype=dtype))
                continue
            if source.shapes[stored] != (size, size):
                raise StatisticsError(
                    f"{source.label}: {stored} has shape {list(source.shapes[stored])}, not {[size] * 2}"
                )
            values = source.tensor(stored).to(dtype)
            check_statistics(values, source.label, stored)
            projected.append(values if basis is None else basis.mT @ values @ basis)
        moments[part.name] = torch.stack(projected)
    return moments


# --- results --------------------------------------------------------------------------------------------------------


def _merged(
    layer: Layer,
    core: UnionCore | None,
    adapters: Sequence[Adapter],
    method: Method,
    config: Any,
    survey: Any,
    out_rank: int | None,
) -> MergedUpdate:
    merged = method.merge(layer, config, survey)
    check_merged(merged.task_vector, layer.name, method.name)
    if core is None:
        return _unfactored(layer, merged)
    return _cut(layer.name, adapters, core.expand(factorize(merged.task_vector.double())), merged, out_rank)


def _whole(
    layer: Layer, adapters: Sequence[Adapter], method: Method, config: Any, survey: Any, out_rank: int | None
) -> MergedUpdate:
    """A layer that was merged as a whole, factorised."""
    merged = method.merge(layer, config, survey)
    check_merged(merged.task_vector, layer.name, method.name)
    if layer.base.ndim < 2:
        return _unfactored(layer, merged)
    thin = factorize(merged.task_vector.flatten(1).float())
    update = LowRank(thin.u.double(), thin.s.double(), thin.v.double())
    return _cut(layer.name, adapters, update, merged, out_rank)


def _unfactored(layer: Layer, merged: LayerMerge) -> MergedUpdate:
    """A parameter that is no matrix: its whole task vector, in memory of its own."""
    shape, norm = tuple(layer.base.shape), float(merged.task_vector.norm())
    report = LayerReport(layer.name, shape, norm, rank=merged.rank, solve=merged.solve)
    return MergedUpdate(layer.name, shape, merged.task_vector.clone(), report)


def _cut(
    name: str, adapters: Sequence[Adapter], update: LowRank, merged: LayerMerge, out_rank: int | None
) -> MergedUpdate:
    """A matrix, cut to the rank that it may have."""
    shape = tuple(adapters[0].base.shapes[name])
    ranks = [adapter.rank(name) for adapter in adapters]
    limit = min(sum(ranks), shape[0], math.prod(shape[1:]))
    kept = update.truncated(limit if out_rank is None else min(out_rank, limit))
    cut_off = float(update.s[kept.rank :].norm() / update.s.norm()) if update.rank else 0.0
    adapter = AdapterReport(tuple(ranks), kept.rank, cut_off)
    norm = float(kept.s.norm())
    return MergedUpdate(
        name, shape, kept, LayerReport(name, shape, norm, adapter=adapter, rank=merged.rank, solve=merged.solve)
    )
