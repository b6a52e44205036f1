"""What a set of checkpoints looks like before it is merged: `diagnose(recipe)`.

resolve and check as for a merge -> one decomposition per task and layer, at the largest rank -> for every rank the
leading triples whitened again, energy kept, curvature (Theorems 2 and 3, `numerics.diagnostics`) -> verdict in words

Layers are streamed, and a few numbers of each are kept. Everything but the curvature needs no data; without Fisher
information for all models that part is left out, and a note says how to get it. Losses here are second-order ones with
a diagonal curvature taken at the optimum, far below what a merge really costs: compare their shares, not their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hf_epimer.analysis import RANKS
from hf_epimer.analysis.diagnosis_report import REPORT, Diagnosis, LayerAtRank, LayerDiagnosis, shares
from hf_epimer.analysis.verdict import RankTotals, verdict
from hf_epimer.checkpoints.folders import atomic_folder
from hf_epimer.checkpoints.writer import write_json
from hf_epimer.curvature.comparison import Agreement, compare_with_hessian
from hf_epimer.curvature.request import CurvatureRequest
from hf_epimer.errors import StatisticsError, UsageError
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.stream import stream_layers, tagged_bases
from hf_epimer.methods import Layer
from hf_epimer.methods.epimer_core import EpiMerCoreConfig
from hf_epimer.methods.statistic import FISHER_DIAGONAL
from hf_epimer.numerics.diagnostics import (
    CurvatureDiagnosis,
    cosines,
    curvature_diagnosis,
    flat_diagnosis,
    kept_energy,
    task_gram,
)
from hf_epimer.numerics.linalg import SVD
from hf_epimer.numerics.spikes import without_spikes
from hf_epimer.numerics.subspace import capped_rank, projected_coordinates, task_triples, whitened_basis
from hf_epimer.pipeline.inputs import fetch, open_inputs
from hf_epimer.pipeline.plan import Plan
from hf_epimer.pipeline.planner import make_plan
from hf_epimer.pipeline.processes import check_alone
from hf_epimer.pipeline.recipe import MergeRecipe
from hf_epimer.tasks.dataset import Sampling, TaskImages


def diagnose(
    recipe: MergeRecipe,
    ranks: Sequence[int] = RANKS,
    out: str = "diagnosis",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    *,
    estimate: bool = False,
    exact: bool = False,
) -> Diagnosis:
    """Look at the checkpoints of a planned merge: report and pictures into `out`.

    Args:
        recipe: of the merge; its method, options and destination are not looked at.
        ranks: directions per task, capped per layer at floor(min(m, n) / T).
        out: folder to write; a non-empty one is refused unless `recipe.overwrite`.
        progress: called as by `hf_epimer.merge`.
        estimate: Fisher information that is missing, as a merge does, rather than do without.
        exact: compare every metric with the exact Hessian, at the smallest rank, on the attention outputs and second
            MLP layers of the first, middle and last block. For small models: it takes many passes.

    Raises:
        UsageError: fewer than two checkpoints, or a rank below 1.
        EpimerError: what `merge` raises before it writes; nothing half-written is left.
    """
    check_alone("diagnose")
    if len(recipe.models) < 2:
        raise UsageError("diagnose compares checkpoints: give at least two")
    wanted = sorted(set(ranks))
    if not wanted or not all(isinstance(rank, int) and rank >= 1 for rank in wanted):
        raise UsageError(f"--rank must be whole numbers of at least 1, not {', '.join(map(str, ranks)) or 'none'}")
    local = replace(recipe.looked_into(out), method="epimer", options=None, evaluate=False)
    plan = make_plan(local, statistics_optional=not estimate)
    fetch(plan, progress)
    ingredients = open_inputs(plan, progress)
    with atomic_folder(local.target, REPORT, recipe.overwrite) as folder:
        progress("diagnosing", 0, len(plan.shapes))
        layers = []
        for layer in diagnose_layers(ingredients, wanted, seed=recipe.seed, exact=recipe.exact, device=recipe.device):
            layers.append(layer)
            progress("diagnosing", 1, len(plan.shapes))
        diagnosis = _summary(plan, wanted, layers, local.target)
        if exact:
            diagnosis = replace(diagnosis, exact=_against_hessian(plan, ingredients, wanted[0], progress))
        write_json(folder / REPORT, diagnosis.to_json())
        pictures = _draw(diagnosis, folder)
    return replace(diagnosis, pictures=pictures)


def _against_hessian(
    plan: Plan, ingredients: Ingredients, rank: int, progress: Callable[[str, int, int], None]
) -> dict[str, dict[str, Agreement]]:
    """How good each approximation is, task by task, on a few layers."""
    architecture = plan.architecture
    last = plan.base.vision_config[architecture.depth] - 1
    chosen = [
        f"{architecture.prefix}{architecture.blocks}.{index}.{residual.writes}.weight"
        for index in sorted({0, last // 2, last})
        for residual in architecture.residuals
    ]
    bases = tagged_bases(ingredients, rank, seed=plan.recipe.seed)
    few = {name: bases[name] for name in chosen if name in bases}
    progress("exact Hessians", 0, len(plan.models))
    agreements = {}
    for model in plan.models:
        if model.task is None:
            raise StatisticsError(f"{model}: --exact needs its task; label it (dtd=REF) or add --task FILE")
        images = TaskImages(model.task, Sampling(plan.recipe.samples, seed=plan.recipe.seed))
        agreements[model.label] = compare_with_hessian(CurvatureRequest(model.source, plan.base, images), few)
        progress("exact Hessians", 1, len(plan.models))
    return agreements


def diagnose_layers(
    ingredients: Ingredients, ranks: Sequence[int], *, seed: int = 0, exact: bool = False, device: str = "cpu"
) -> Iterator[LayerDiagnosis]:
    """Every parameter in the order of the base, one pass over the files.

    Args:
        ingredients: checked to fit together; Fisher diagonals as statistics, or none.
        ranks: ascending.
        seed, exact, device: as in `merge_layers`.
    """
    needs = FISHER_DIAGONAL if ingredients.statistics else None
    return stream_layers(
        ingredients, lambda layer: diagnose_layer(layer, ranks), needs, seed=seed, exact=exact, device=device
    )


def diagnose_layer(layer: Layer, ranks: Sequence[int]) -> LayerDiagnosis:
    """One parameter at every rank, from one decomposition at the largest."""
    v = layer.statistics.get("fisher")
    shape = tuple(layer.base.shape)
    capped = {rank: capped_rank(rank, (shape[0], shape[1]), layer.tasks) for rank in ranks} if layer.is_matrix else {}
    deepest = max(capped.values(), default=0)
    changed = deepest > 0 and bool(layer.task_vectors.any())
    triples = task_triples(layer.task_vectors, deepest, exact=layer.exact, seed=layer.seed) if changed else []
    distinct = {rank: _at_rank(layer, triples, rank, v) for rank in set(capped.values())} if changed else {}
    return LayerDiagnosis(
        name=layer.name,
        shape=shape,
        gram=task_gram(layer.task_vectors).cpu(),
        spikes=_spikes(layer) if changed else (),
        at={rank: distinct[capped_at] for rank, capped_at in capped.items()} if changed else {},
        mean=flat_diagnosis(layer.task_vectors, v, layer.weights) if v is not None and not changed else None,
    )


def _spikes(layer: Layer) -> tuple[float, ...]:
    _, gone = without_spikes(layer.task_vectors, EpiMerCoreConfig().cap, exact=layer.exact, seed=layer.seed)
    return tuple(gone.tolist())


def _at_rank(layer: Layer, triples: Sequence[SVD], rank: int, v: Tensor | None) -> LayerAtRank:
    basis = whitened_basis(triples, rank, exact=layer.exact)
    assert basis is not None  # some task has changed this layer
    kept = kept_energy(basis, projected_coordinates(basis, layer.task_vectors))
    singular = tuple(float(svd.s[:rank].square().sum()) for svd in triples)
    at_rank = LayerAtRank(rank, basis.size, tuple(kept.tolist()), singular, None)
    if v is None:
        return at_rank
    curvature, isotropy = curvature_diagnosis(basis, layer.task_vectors, v, layer.weights, exact=layer.exact)
    return replace(at_rank, curvature=curvature, isotropy=isotropy)


# --- totals ---------------------------------------------------------------------------------------------------------


def rank_totals(layers: Sequence[LayerDiagnosis], rank: int) -> RankTotals:
    """The whole model at one of the ranks that were asked for."""
    matrices = [layer for layer in layers if layer.at]
    at = [layer.at[rank] for layer in matrices]
    known = [entry.curvature for entry in at if entry.curvature] + [layer.mean for layer in layers if layer.mean]
    deviations = [entry.isotropy for entry in at if math.isfinite(entry.isotropy)]
    tasks = range(len(layers[0].gram))
    energy = [math.fsum(float(layer.gram[task, task]) for layer in matrices) for task in tasks]
    return RankTotals(
        rank=rank,
        capped=sum(entry.rank < rank for entry in at),
        kept=shares([math.fsum(entry.kept[task] for entry in at) for task in tasks], energy),
        singular=shares([math.fsum(entry.singular[task] for entry in at) for task in tasks], energy),
        curvature=CurvatureDiagnosis.total(known) if known else None,
        isotropy=(math.fsum(deviations) / len(deviations), max(deviations)) if deviations else (math.nan, math.nan),
        beside=math.fsum(layer.mean.variance for layer in layers if layer.mean),
    )


def spike_totals(layers: Sequence[LayerDiagnosis]) -> tuple[float, ...]:
    """The share of every task vector's matrices that stands out among the tasks."""
    matrices = [layer for layer in layers if layer.spikes]
    tasks = range(len(layers[0].gram))
    squares = [[float(layer.gram[task, task]) for layer in matrices] for task in tasks]
    parts = [math.fsum(x * layer.spikes[task] for x, layer in zip(squares[task], matrices)) for task in tasks]
    return tuple(part / whole if whole > 0 else 0.0 for part, whole in zip(parts, map(math.fsum, squares)))


def _summary(plan: Plan, ranks: Sequence[int], layers: Sequence[LayerDiagnosis], out: Path) -> Diagnosis:
    labels = tuple(model.label for model in plan.models)
    totals = tuple(rank_totals(layers, rank) for rank in ranks)
    gram = torch.stack([layer.gram for layer in layers]).sum(0)
    spikes = spike_totals(layers)
    return Diagnosis(
        base=str(plan.recipe.base),
        models=tuple(map(str, plan.recipe.models)),
        statistics=labels if plan.statistic else (),
        labels=labels,
        weights=plan.weights,
        layers=tuple(layers),
        totals=totals,
        gram=gram,
        spikes=spikes,
        verdict=verdict(labels, totals, gram, spikes),
        note=None if plan.statistic else _NO_CURVATURE,
        out=out,
    )


_NO_CURVATURE = (
    "Nothing is said about curvature: not every checkpoint has Fisher information. Add --samples 256 to estimate it "
    "now (with --task FILE where the task is not known), or give files made by `hf-epimer fisher` with --fisher."
)


def _draw(diagnosis: Diagnosis, folder: Path) -> tuple[str, ...]:
    """The pictures; none where matplotlib is missing."""
    from hf_epimer import plotting
    from hf_epimer.analysis import plots

    if not plotting.available():
        return ()
    last = diagnosis.totals[-1]
    figures = {"cosines.png": plots.cosine_matrix(diagnosis.labels, cosines(diagnosis.gram).tolist())}
    if math.isfinite(last.least_kept):
        figures["energy.png"] = plots.energy_by_rank(
            diagnosis.labels,
            [total.rank for total in diagnosis.totals],
            [total.kept for total in diagnosis.totals],
            [total.singular for total in diagnosis.totals],
        )
    if last.curvature and math.isfinite(last.isotropy[0]):
        known = {layer.name: layer.at[last.rank].curvature for layer in diagnosis.layers if layer.at}
        figures["eta.png"] = plots.eta_by_layer(
            {name: (curvature.eta, curvature.spread) for name, curvature in known.items() if curvature},
            {name: (curvature.eta_trace, curvature.spread_trace) for name, curvature in known.items() if curvature},
            last.rank,
        )
    return tuple(plotting.save(figures, folder))
