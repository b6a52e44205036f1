"""What a set of checkpoints looks like before it is merged: `diagnose(recipe)`.

resolve and check as for a merge -> one decomposition per task and layer, at the largest rank -> for every rank the
leading triples whitened again, energy kept, curvature (Theorems 2 and 3, `numerics.diagnostics`) -> verdict in words

Layers are streamed, and a few numbers of each are kept. Everything but the curvature needs no data; without Fisher
information for all models that part is left out, and a note says how to get it. Losses here are second-order ones with
a diagonal curvature taken at the optimum, far below what a merge really costs: compare their shares, not their sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_epimer import hub
from hf_epimer.config import MergeRecipe
from hf_epimer.errors import UsageError
from hf_epimer.merging import Ingredients, stream_layers
from hf_epimer.methods import Layer
from hf_epimer.methods.base import Statistic
from hf_epimer.numerics.diagnostics import (
    CurvatureDiagnosis,
    cosines,
    curvature_diagnosis,
    flat_diagnosis,
    kept_energy,
    task_gram,
)
from hf_epimer.numerics.linalg import SVD
from hf_epimer.numerics.subspace import capped_rank, projected_coordinates, task_triples, whitened_basis
from hf_epimer.planning import Plan, make_plan, open_ingredients, statistics_name, weight_names
from hf_epimer.writing import atomic_folder

RANKS = (4, 8, 16, 32)
REPORT = "diagnosis.json"
FORMAT = "hf-epimer.diagnosis/1"

HARDLY = 0.01
"""Share of the flat mean's spread below which eta counts as nothing: no test set of usual size shows it."""

STEEPEST = 3.0
"""How many times the average of the others a task's curvature must be for the merge to lean on it."""

HALF = 0.5
"""Share of a task vector that a rank should keep."""

AGAINST = -0.1
"""Cosine below which two tasks point against each other: random directions of this size stay within .001."""


@dataclass(frozen=True)
class LayerAtRank:
    """One matrix at one rank: squared norms per task, and the curvature where it is known.

    Attributes:
        rank: k_l, capped.
        atoms: p.
        kept: ||P D_t||^2, P the projection onto the tagged basis.
        singular: the sum of the k_l leading squared singular values, which a basis of one's own would keep.
        curvature: Theorems 2 and 3; None without Fisher information.
        isotropy: || p H_bar / tr H_bar - I ||_2; NaN where there is no curvature.
    """

    rank: int
    atoms: int
    kept: tuple[float, ...]
    singular: tuple[float, ...]
    curvature: CurvatureDiagnosis | None
    isotropy: float = math.nan


@dataclass(frozen=True)
class LayerDiagnosis:
    """One parameter.

    Attributes:
        gram: <D_s, D_t>, T x T.
        at: requested rank -> what it gives; empty for parameters that take the mean of their task vectors.
        mean: Theorem 2 for those; None without Fisher information.
    """

    name: str
    shape: tuple[int, ...]
    gram: Tensor
    at: dict[int, LayerAtRank]
    mean: CurvatureDiagnosis | None

    @property
    def norms(self) -> list[float]:
        """||D_t||."""
        return [float(value) for value in self.gram.diagonal().sqrt()]


@dataclass(frozen=True)
class RankTotals:
    """The whole model at one rank.

    Attributes:
        capped: layers where floor(min(m, n) / T) is less than the rank.
        kept, singular: shares of every task's matrices, in [0, 1]; NaN for a task that changed none.
        curvature: summed over all parameters; None without Fisher information.
        isotropy: mean and largest deviation of a matrix.
        beside: the part of V_S that is of parameters which take the mean: biases, norms and other non-matrices.
    """

    rank: int
    capped: int
    kept: tuple[float, ...]
    singular: tuple[float, ...]
    curvature: CurvatureDiagnosis | None
    isotropy: tuple[float, float]
    beside: float = 0.0

    @property
    def least_kept(self) -> float:
        """Share of the task of which least is kept."""
        return min(filter(math.isfinite, self.kept), default=math.nan)

    @property
    def least_singular(self) -> float:
        """The same for the tasks' own directions."""
        return min(filter(math.isfinite, self.singular), default=math.nan)


@dataclass(frozen=True)
class Diagnosis:
    """What was found; `diagnosis.json` is its JSON.

    Attributes:
        base, models, statistics: pinned references; no statistics: no curvature.
        labels: of the models.
        weights: l_t.
        layers: every parameter, in the order of the model.
        totals: one entry per rank.
        gram: <D_s, D_t> of the whole model.
        verdict: findings in words, each with the numbers that led to it.
        note: why nothing is said about curvature and how to change that; None when something is.
        out: the folder.
        pictures: names of the files in it; none where matplotlib is missing.
    """

    base: str
    models: tuple[str, ...]
    statistics: tuple[str, ...]
    labels: tuple[str, ...]
    weights: tuple[float, ...]
    layers: tuple[LayerDiagnosis, ...]
    totals: tuple[RankTotals, ...]
    gram: Tensor
    verdict: tuple[str, ...]
    note: str | None
    out: Path
    pictures: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything but where it went; what is not defined is null."""
        return {
            "format": FORMAT,
            "base": self.base,
            "models": list(self.models),
            "labels": list(self.labels),
            "weights": list(self.weights),
            "curvature": {"statistics": list(self.statistics)} if self.statistics else None,
            "note": self.note,
            "verdict": list(self.verdict),
            "totals": {
                "task_vector_norms": [float(value) for value in self.gram.diagonal().sqrt()],
                "cosine": _matrix(cosines(self.gram)),
                "ranks": [
                    {
                        "rank": total.rank,
                        "capped_layers": total.capped,
                        "energy_kept": _numbers(total.kept),
                        "singular_energy": _numbers(total.singular),
                        "curvature": _curvature(total.curvature)
                        | {"isotropy_deviation": dict(zip(("mean", "largest"), _numbers(total.isotropy)))}
                        | {"V_S_of_non_matrices": total.beside}
                        if total.curvature
                        else None,
                    }
                    for total in self.totals
                ],
            },
            "layers": [_layer(layer) for layer in self.layers],
        }


def diagnose(
    recipe: MergeRecipe,
    ranks: Sequence[int] = RANKS,
    out: str = "diagnosis",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Diagnosis:
    """Look at the checkpoints of a planned merge: report and pictures into `out`.

    Args:
        recipe: of the merge; its method, options and destination are not looked at.
        ranks: directions per task, capped per layer at floor(min(m, n) / T).
        out: folder to write; a non-empty one is refused unless `recipe.overwrite`.
        progress: called as by `hf_epimer.merge`.

    Raises:
        UsageError: fewer than two checkpoints, or a rank below 1.
        EpimerError: what `merge` raises before it writes; nothing half-written is left.
    """
    if len(recipe.models) < 2:
        raise UsageError("diagnose compares checkpoints: give at least two")
    wanted = sorted(set(ranks))
    if not wanted or not all(isinstance(rank, int) and rank >= 1 for rank in wanted):
        raise UsageError(f"--rank must be whole numbers of at least 1, not {', '.join(map(str, ranks)) or 'none'}")
    local = replace(recipe, method="epimer", options=None, out=out, evaluate=False)
    plan = make_plan(replace(local, push_to=None, private=False, create_pr=False), statistics_optional=True)
    files = [(source, name) for source in (plan.base, *plan.models) for name in weight_names(source)]
    files += [(source, statistics_name(source)) for source in plan.fisher or ()]
    remote = [(source, name) for source, name in files if not source.ref.is_local]
    size = sum(source.sizes.get(name, 0) for source, name in remote)
    progress("fetching", 0, size)
    hub.fetch_all(remote, lambda done: progress("fetching", done, size))
    ingredients = open_ingredients(plan)
    with atomic_folder(Path(out), recipe.overwrite) as folder:
        progress("diagnosing", 0, len(plan.shapes))
        layers = []
        for layer in diagnose_layers(ingredients, wanted, seed=recipe.seed, exact=recipe.exact, device=recipe.device):
            layers.append(layer)
            progress("diagnosing", 1, len(plan.shapes))
        found = _summary(plan, wanted, layers, Path(out))
        text = json.dumps(found.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")
        pictures = _draw(found, folder)
    return replace(found, pictures=pictures)


def diagnose_layers(
    ingredients: Ingredients, ranks: Sequence[int], *, seed: int = 0, exact: bool = False, device: str = "cpu"
) -> Iterator[LayerDiagnosis]:
    """Every parameter in the order of the base, one pass over the files.

    Args:
        ingredients: checked to fit together; Fisher diagonals as statistics, or none.
        ranks: ascending.
        seed, exact, device: as in `merge_layers`.
    """
    needs: Statistic | None = "fisher" if ingredients.statistics else None
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
        at={rank: distinct[own] for rank, own in capped.items()} if changed else {},
        mean=flat_diagnosis(layer.task_vectors, v, layer.weights) if v is not None and not changed else None,
    )


def _at_rank(layer: Layer, triples: Sequence[SVD], rank: int, v: Tensor | None) -> LayerAtRank:
    basis = whitened_basis(triples, rank, exact=layer.exact)
    assert basis is not None  # some task has changed this layer
    kept = kept_energy(basis, projected_coordinates(basis, layer.task_vectors))
    singular = tuple(float(own.s[:rank].square().sum()) for own in triples)
    found = LayerAtRank(rank, basis.size, tuple(kept.tolist()), singular, None)
    if v is None:
        return found
    curvature, isotropy = curvature_diagnosis(basis, layer.task_vectors, v, layer.weights, exact=layer.exact)
    return replace(found, curvature=curvature, isotropy=isotropy)


# --- totals and verdict ---------------------------------------------------------------------------------------------


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
        kept=_shares([math.fsum(entry.kept[task] for entry in at) for task in tasks], energy),
        singular=_shares([math.fsum(entry.singular[task] for entry in at) for task in tasks], energy),
        curvature=CurvatureDiagnosis.total(known) if known else None,
        isotropy=(math.fsum(deviations) / len(deviations), max(deviations)) if deviations else (math.nan, math.nan),
        beside=math.fsum(layer.mean.variance for layer in layers if layer.mean),
    )


def _shares(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, ...]:
    return tuple(part / whole if whole > 0 else math.nan for part, whole in zip(parts, wholes))


def verdict(labels: Sequence[str], totals: Sequence[RankTotals], gram: Tensor) -> tuple[str, ...]:
    """Findings in words. The rule, with eta, V_S, R_S at the largest rank and summed over the model:

    1. eta below `HARDLY` of F(c_bar), the flat mean's spread: curvature hardly matters, whatever the metric does.
       Above it, but below once every H_t has the same trace: only the sizes of the tasks' curvatures act, as one weight
       per task and layer; mostly so where equal traces leave less than half. Else directions act too. eta is what the
       Fréchet mean saves of the second-order loss, so it bounds what there is to win; it promises no accuracy.
    2. A task whose curvature (l_t tr H_t) is more than `STEEPEST` times the average of the others pulls the merge.
    3. R_S above the matrices' V_S: what the basis leaves out costs more than what the tasks disagree about within it.
       Then the rank with the smallest R_S is named if it is smaller by a tenth than at the largest rank; else a higher
       rank is advised if R_S has fallen by a tenth or more on the way there.
    4. The smallest rank from which on every task keeps `HALF` of its matrices; where no rank does, but the task's own
       directions would, whitening them against the other tasks' is what costs.
    5. Pairs of task vectors with a cosine below `AGAINST`.
    """
    last = totals[-1]
    words = []
    if last.curvature:
        words.append(_curvature_matters(last))
        words += _steepest(labels, last.curvature)
        words += _outside(totals)
    words += _energy_kept(labels, totals)
    return (*words, _directions(labels, gram))


def _curvature_matters(last: RankTotals) -> str:
    assert last.curvature
    share, equal = last.curvature.share, last.curvature.share_trace
    numbers = f"at rank {last.rank} eta is {share:.1%} of the flat mean's spread"
    if not math.isfinite(last.isotropy[0]):
        return "Curvature has nothing to act on: no matrix was changed and has Fisher information that is not zero."
    isotropy = f"isotropy deviation {last.isotropy[0]:.2f} on average, {last.isotropy[1]:.2f} at most"
    if share < HARDLY:
        return f"Curvature will hardly matter: {numbers}, {isotropy}. tsv-m needs no data and should do as well."
    numbers += f", {equal:.1%} once every task's curvature has the same trace; {isotropy}."
    if equal < HARDLY:
        return f"Curvature acts only as one weight per task and layer: {numbers}"
    return f"Curvature can matter{', mostly as one weight per task and layer' if 2 * equal < share else ''}: {numbers}"


def _steepest(labels: Sequence[str], curvature: CurvatureDiagnosis) -> list[str]:
    total = math.fsum(curvature.traces)
    steepest = max(range(len(labels)), key=lambda task: curvature.traces[task])
    own = curvature.traces[steepest]
    if own * (len(labels) - 1) <= STEEPEST * (total - own):
        return []
    return [
        f"{labels[steepest]} has {own / total:.0%} of all curvature, so the literal merge leans on it; "
        "--normalize trace gives every task the same say."
    ]


def _outside(totals: Sequence[RankTotals]) -> list[str]:
    known = {total.rank: total.curvature for total in totals if total.curvature}
    outside = {rank: own.residual for rank, own in known.items()}
    last = totals[-1].rank
    inside = known[last].variance - totals[-1].beside
    if outside[last] <= inside:
        return []
    best = min(outside, key=lambda rank: outside[rank])
    if len(outside) == 1:
        trend = ""
    elif outside[best] < 0.9 * outside[last]:
        trend = f"; rank {best} leaves out least (R_S {outside[best]:.2g})"
    elif outside[last] < 0.9 * outside[totals[0].rank]:
        trend = f"; R_S falls with rank ({outside[totals[0].rank]:.2g} at rank {totals[0].rank}), so try a higher one"
    else:
        trend = f"; rank makes little difference (R_S {outside[totals[0].rank]:.2g} at rank {totals[0].rank})"
    return [
        f"What rank {last} leaves out of the matrices costs more than what the tasks disagree about within it "
        f"(R_S {outside[last]:.2g}, V_S of the matrices {inside:.2g}){trend}."
    ]


def _energy_kept(labels: Sequence[str], totals: Sequence[RankTotals]) -> list[str]:
    lacking = [{task: kept for task, kept in zip(labels, total.kept) if kept < HALF} for total in totals]
    least = {task: kept for task, kept in zip(labels, totals[-1].kept) if math.isfinite(kept)}
    if not least:
        return []
    last = totals[-1]
    if lacking[-1]:
        worst = min(lacking[-1], key=lambda task: lacking[-1][task])
        alone = dict(zip(labels, last.singular))[worst]
        cost = f"; its own directions alone would keep {alone:.0%}, whitening costs the rest" if alone >= HALF else ""
        return [
            f"Even rank {last.rank} throws away more than half of {_some(lacking[-1])} ({_kept(worst, least)}{cost})."
        ]
    if not any(lacking):
        first = dict(zip(labels, totals[0].kept))
        worst = min(least, key=lambda task: first[task])
        return [f"Every rank keeps at least half of every task (rank {totals[0].rank}: {_kept(worst, first)})."]
    index = max(index for index, short in enumerate(lacking) if short)
    worst = min(lacking[index], key=lambda task: lacking[index][task])
    return [
        f"Ranks below {totals[index + 1].rank} throw away more than half of {_some(lacking[index])} "
        f"(rank {totals[index].rank}: {_kept(worst, lacking[index])})."
    ]


def _kept(task: str, kept: dict[str, float]) -> str:
    return f"{kept[task]:.0%} of {task} kept"


def _some(tasks: dict[str, float]) -> str:
    names = sorted(tasks, key=lambda task: tasks[task])
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _directions(labels: Sequence[str], gram: Tensor) -> str:
    cosine = cosines(gram)
    pairs = {(s, t): float(cosine[s, t]) for s, t in combinations(range(len(labels)), 2)}
    pairs = {pair: value for pair, value in pairs.items() if math.isfinite(value)}
    against = sorted((pair for pair in pairs if pairs[pair] < AGAINST), key=lambda pair: pairs[pair])
    if against:
        named = [f"{labels[s]} and {labels[t]} (cosine {pairs[s, t]:.2f})" for s, t in against[:3]]
        more = f" and {len(against) - 3} more pairs" if len(against) > 3 else ""
        return f"Tasks that point against each other: {', '.join(named)}{more}."
    if not pairs:
        return "No two task vectors can be compared: at most one is not zero."
    low, high = min(pairs.values()), max(pairs.values())
    numbers = f"cosines from {low:.2f} to {high:.2f}" if len(pairs) > 1 else f"cosine {low:.2f}"
    return f"No two tasks point against each other ({numbers})."


def _summary(plan: Plan, ranks: Sequence[int], layers: Sequence[LayerDiagnosis], out: Path) -> Diagnosis:
    labels = tuple(model.label for model in plan.models)
    totals = tuple(rank_totals(layers, rank) for rank in ranks)
    gram = torch.stack([layer.gram for layer in layers]).sum(0)
    return Diagnosis(
        base=str(plan.recipe.base),
        models=tuple(map(str, plan.recipe.models)),
        statistics=tuple(map(str, plan.fisher or ())),
        labels=labels,
        weights=plan.weights,
        layers=tuple(layers),
        totals=totals,
        gram=gram,
        verdict=verdict(labels, totals, gram),
        note=None if plan.fisher else _NO_CURVATURE,
        out=out,
    )


_NO_CURVATURE = (
    "Nothing is said about curvature: not every checkpoint has Fisher information. Estimate it with `hf-epimer fisher "
    "REF --task NAME --out FILE` and give it with --fisher, or put it beside the weights as fisher.safetensors."
)


# --- the report -----------------------------------------------------------------------------------------------------


def _layer(layer: LayerDiagnosis) -> dict[str, Any]:
    energy = layer.gram.diagonal().tolist()
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "task_vector_norms": layer.norms,
        "cosine": _matrix(cosines(layer.gram)),
        "ranks": [
            {
                "rank": rank,
                "capped_rank": entry.rank,
                "atoms": entry.atoms,
                "energy_kept": _numbers(_shares(entry.kept, energy)),
                "singular_energy": _numbers(_shares(entry.singular, energy)),
                "curvature": _curvature(entry.curvature) | {"isotropy_deviation": _number(entry.isotropy)}
                if entry.curvature
                else None,
            }
            for rank, entry in layer.at.items()
        ],
        "curvature": _bound(layer.mean) if layer.mean else None,
    }


def _curvature(found: CurvatureDiagnosis) -> dict[str, Any]:
    total = math.fsum(found.traces)
    return {
        "eta": found.eta,
        "eta_share": found.share,
        "eta_trace": found.eta_trace,
        "eta_trace_share": found.share_trace,
        **_bound(found),
        "curvature_shares": [trace / total if total > 0 else None for trace in found.traces],
    }


def _bound(found: CurvatureDiagnosis) -> dict[str, Any]:
    return {"V_S": found.variance, "R_S": found.residual, "bound": found.bound, "loss": found.loss}


def _matrix(values: Tensor) -> list[list[float | None]]:
    return [_numbers(row) for row in values.tolist()]


def _numbers(values: Sequence[float]) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _draw(found: Diagnosis, folder: Path) -> tuple[str, ...]:
    """The pictures; none where matplotlib is missing."""
    from hf_epimer import plots

    if not plots.available():
        return ()
    last = found.totals[-1]
    figures = {"cosines.png": plots.cosine_matrix(found.labels, cosines(found.gram).tolist())}
    if math.isfinite(last.least_kept):
        figures["energy.png"] = plots.energy_by_rank(
            found.labels,
            [total.rank for total in found.totals],
            [total.kept for total in found.totals],
            [total.singular for total in found.totals],
        )
    if last.curvature and math.isfinite(last.isotropy[0]):
        known = {layer.name: layer.at[last.rank].curvature for layer in found.layers if layer.at}
        figures["eta.png"] = plots.eta_by_layer(
            {name: (own.eta, own.spread) for name, own in known.items() if own},
            {name: (own.eta_trace, own.spread_trace) for name, own in known.items() if own},
            last.rank,
        )
    return tuple(plots.save(figures, folder))
