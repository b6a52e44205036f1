"""EpiMer with a full core and Kronecker curvature, ours. Recipes of version 0.1 call it `epimer-core`.

    W = W_0 + alpha U M V^T,   U, V as in EpiMer (eq 10), M a full p x p matrix instead of a diagonal:
    sum_t w_t (U^T S_t U) M (V^T A_t V) + rho M = sum_t w_t U^T S_t D_t A_t V + rho M_0

S_t, A_t are the Kronecker factors of task t's Fisher information (K-FAC), w_t makes every task's curvature of mean 1 on
the core, and M_0 is the core of TSV-M (or Iso-C), to which rho pulls what the curvature leaves open. Three differences
to the paper: directions may be combined anew, the right side keeps what the metric says of each D_t outside the basis,
and tasks are on one scale. `hf_epimer.numerics.core` has the objective.

Limits: rho -> infinity is TSV-M (or Iso-C within the basis). With S_t = I, a basis that spans everything and rho -> 0
it is RegMean. Where all curvature is diagonal in the basis M is, too, and each atom is solved as in EpiMer.

`metric="inputs"` takes S_t = I, which needs no labels, `metric="task-vectors"` A_t = D_t^T D_t besides, which needs no
data at all. Parameters that are no matrices take the mean of the task vectors, those without factors the scaffold.

That is the method as a function of one layer, which is all that is here. What a merge by it loses between its layers is
mended by calibration, which `hf-epimer merge` does by itself after this method where there are images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from hf_epimer.methods.base import Layer, LayerMerge, Method, MethodConfig
from hf_epimer.methods.basis import layer_basis
from hf_epimer.methods.epimer import EPIMER
from hf_epimer.methods.iso import IsoCConfig, merge_iso_c
from hf_epimer.methods.options import option
from hf_epimer.methods.report import SolveReport
from hf_epimer.methods.statistic import GRAM, KRONECKER

if TYPE_CHECKING:
    from torch import Tensor

    from hf_epimer.numerics.subspace import TaggedBasis


@dataclass(frozen=True)
class KroneckerCoreConfig(MethodConfig):
    """Options of `kronecker-core`."""

    rank: int = option(32, "directions per task, capped at floor(min(m, n) / T)", low=1)
    alpha: float = option(1.0, "global scale of the merged task vector")
    metric: Literal["kronecker", "inputs", "task-vectors"] = option(
        "kronecker", "Kronecker factors, their input side alone (no labels), or task vectors (no data)"
    )
    scaffold: Literal["tsv-m", "iso-c"] = option("tsv-m", "the method whose core the solution is pulled towards")
    rho: float = option(1.0, "strength of the pull towards the scaffold, in units of the mean curvature", low=1e-9)


def merge_kronecker_core(layer: Layer, config: KroneckerCoreConfig, survey: None = None) -> LayerMerge:
    """Solve one layer: basis, projected factors, scaffold, one generalised Sylvester equation."""
    from hf_epimer.numerics.core import full_core

    basis, rank = layer_basis(layer, config.rank)
    if basis is None:
        return LayerMerge(layer.mean() * config.alpha, rank)
    scaffold = _scaffold(layer, basis, config.scaffold)
    inputs = _inputs(layer, config.metric)
    core, solve = scaffold, None
    if inputs is not None:
        outputs = list(layer.measured("output")) if config.metric == "kronecker" else None
        found = full_core(basis, layer.task_vectors, outputs, inputs, layer.weights, scaffold, config.rho)
        core = found.x.to(scaffold.dtype)
        solve = SolveReport(steps=found.steps, residual=found.residual, condition=found.condition)
    return LayerMerge((basis.u @ core @ basis.v.mT) * config.alpha, rank, solve)


def _inputs(layer: Layer, metric: str) -> list[Tensor] | None:
    """A_t; None where there are none, as for an embedding."""
    if metric == "task-vectors":
        return [d.mT @ d for d in layer.task_vectors]
    return list(layer.statistics["input"]) if "input" in layer.statistics else None


def _scaffold(layer: Layer, basis: TaggedBasis, name: str) -> Tensor:
    """M_0: the other method's merge in the basis."""
    if name == "tsv-m":
        return (basis.s * layer.weights[basis.tags] * layer.tasks).diag()
    return basis.u.mT @ merge_iso_c(layer, IsoCConfig()).task_vector @ basis.v


_STATISTICS = {"kronecker": KRONECKER, "inputs": GRAM, "task-vectors": None}

KRONECKER_CORE = Method(
    "kronecker-core",
    "EpiMer with a full core and Kronecker curvature (ours)",
    "W = W_0 + alpha U M V^T,  sum_t w_t U^T S_t U M V^T A_t V + rho M = sum_t w_t U^T S_t D_t A_t V + rho M_0",
    replace(EPIMER.paper, extension="the full core is an extension by hf-epimer"),
    KroneckerCoreConfig,
    merge_kronecker_core,
    needs=KRONECKER,
    needs_with=lambda config: _STATISTICS[config.metric],
    calibrates=True,
    title="Kronecker core",
)
