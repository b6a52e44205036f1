"""What a diagnosis found, in numbers: `diagnosis.json` is its JSON. `hf_epimer.analysis.diagnosis` finds it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_epimer.analysis.verdict import RankTotals
from hf_epimer.curvature.comparison import Agreement
from hf_epimer.numerics.diagnostics import CurvatureDiagnosis, cosines

REPORT = "diagnosis.json"
FORMAT = "hf-epimer.diagnosis/1"


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
        spikes: share of |D_t|^2 that stands out among the tasks (`numerics.spikes`); empty for an unchanged layer.
        at: requested rank -> what it gives; empty for parameters that take the mean of their task vectors.
        mean: Theorem 2 for those; None without Fisher information.
    """

    name: str
    shape: tuple[int, ...]
    gram: Tensor
    spikes: tuple[float, ...]
    at: dict[int, LayerAtRank]
    mean: CurvatureDiagnosis | None

    @property
    def norms(self) -> list[float]:
        """||D_t||."""
        return [float(value) for value in self.gram.diagonal().sqrt()]


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
        spikes: share of every task vector's matrices that stands out among the tasks.
        verdict: findings in words, each with the numbers that led to it.
        note: why nothing is said about curvature and how to change that; None when something is.
        exact: label -> metric -> how well it agrees with the exact Hessian; empty unless asked for.
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
    spikes: tuple[float, ...]
    verdict: tuple[str, ...]
    note: str | None
    out: Path
    pictures: tuple[str, ...] = ()
    exact: dict[str, dict[str, Agreement]] = field(default_factory=dict)

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
            "exact": {
                label: {name: vars(agreement) for name, agreement in agreements.items()}
                for label, agreements in self.exact.items()
            }
            or None,
            "totals": {
                "task_vector_norms": [float(value) for value in self.gram.diagonal().sqrt()],
                "cosine": _matrix(cosines(self.gram)),
                "spikes": list(self.spikes),
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


def _layer(layer: LayerDiagnosis) -> dict[str, Any]:
    energy = layer.gram.diagonal().tolist()
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "task_vector_norms": layer.norms,
        "cosine": _matrix(cosines(layer.gram)),
        "spikes": list(layer.spikes) or None,
        "ranks": [
            {
                "rank": rank,
                "capped_rank": entry.rank,
                "atoms": entry.atoms,
                "energy_kept": _numbers(shares(entry.kept, energy)),
                "singular_energy": _numbers(shares(entry.singular, energy)),
                "curvature": _curvature(entry.curvature) | {"isotropy_deviation": _number(entry.isotropy)}
                if entry.curvature
                else None,
            }
            for rank, entry in layer.at.items()
        ],
        "curvature": _bound(layer.mean) if layer.mean else None,
    }


def _curvature(curvature: CurvatureDiagnosis) -> dict[str, Any]:
    total = math.fsum(curvature.traces)
    return {
        "eta": curvature.eta,
        "eta_share": curvature.share,
        "eta_trace": curvature.eta_trace,
        "eta_trace_share": curvature.share_trace,
        **_bound(curvature),
        "curvature_shares": [trace / total if total > 0 else None for trace in curvature.traces],
    }


def _bound(curvature: CurvatureDiagnosis) -> dict[str, Any]:
    return {"V_S": curvature.variance, "R_S": curvature.residual, "bound": curvature.bound, "loss": curvature.loss}


def _matrix(values: Tensor) -> list[list[float | None]]:
    return [_numbers(row) for row in values.tolist()]


def _numbers(values: Sequence[float]) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def shares(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, ...]:
    """Part by part; NaN where there is no whole."""
    return tuple(part / whole if whole > 0 else math.nan for part, whole in zip(parts, wholes))
