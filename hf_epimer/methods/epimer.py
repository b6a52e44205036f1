"""EpiMer: the Fréchet mean of the task vectors under their projected curvature. Formulas (10) to (14) of the paper.

    S            tagged basis U_i V_i^T, U = polar([U_1 ... U_T]), V = polar([V_1 ... V_T])                     (10)
    H_t          S^T diag(v_t) S, v_t the diagonal empirical Fisher of task t                              (9), (12)
    c_t          S^T vec(D_t) (`projected`), or the singular values on the task's own atoms (`tagged`)
    x            (sum l_t H_t)^{-1} sum l_t H_t c_t                                      aggregator="mean"      (13)
                 alpha T times that                                                      aggregator="sum"       (14)
    W            W_0 + U diag(x) V^T

alpha scales the merged task vector under both aggregators. Equal metrics give alpha sum c_t, TSV-M's aggregation.
Parameters that are not matrices take the mean of the task vectors, or (`vectors="fisher"`) their Fisher average.
Lu, Bhaskar, Axelrod, Tolstaya and Emrich, "Model Merging on Loss Landscape: A Geometry Perspective", arXiv 2605.26693.

Ours, beside the paper's diagonal: the projected Fisher itself (`metric="projected"`, no entry of the curvature thrown
away before projecting) and Kronecker factors (`metric="kronecker"`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from hf_epimer.errors import UsageError
from hf_epimer.methods.base import Layer, LayerMerge, Method, MethodConfig, Paper
from hf_epimer.methods.basis import layer_basis
from hf_epimer.methods.fisher_averaging import FisherConfig, merge_fisher
from hf_epimer.methods.options import option
from hf_epimer.methods.report import SolveReport
from hf_epimer.methods.statistic import FISHER_DIAGONAL, KRONECKER, PROJECTED_FISHER

if TYPE_CHECKING:
    from torch import Tensor

    from hf_epimer.numerics.metric import ProjectedMetrics
    from hf_epimer.numerics.subspace import TaggedBasis


PAPER = {"rank": 32, "coordinates": "projected", "normalize": "none"}
"""The paper's text to the letter, where the defaults differ. On real checkpoints its formula lets the task with the
largest loss decide, and the merge falls below the plain mean."""


@dataclass(frozen=True)
class EpiMerConfig(MethodConfig):
    """Options of `epimer`."""

    rank: int | None = option(
        None, "directions per task, capped at floor(min(m, n) / T); default as many as that", low=1
    )
    alpha: float = option(1.0, "global scale of the merged task vector")
    aggregator: Literal["sum", "mean"] = option("sum", "eq 14 (sum) or eq 13 (mean, under-merges)")
    coordinates: Literal["projected", "tagged"] = option("tagged", "S^T D_t, or singular values on own atoms only")
    metric: Literal["diagonal", "projected", "kronecker"] = option(
        "diagonal", "the paper's Fisher diagonal, the exact projected Fisher, or Kronecker factors"
    )
    normalize: Literal["none", "trace"] = option("trace", "divide every task's metric by its trace, per layer")
    damping: float = option(1e-6, "added to the curvature, relative to its mean; large values give TSV-M", low=0.0)
    shrinkage: float | None = option(
        None, "share of the flat metric in a projected one; default Ledoit and Wolf's", low=0.0, high=1.0
    )
    vectors: Literal["mean", "fisher"] = option("mean", "rule for biases, norms and other non-matrices")
    preset: Literal["none", "paper"] = option(
        "none", "paper: --rank 32 --coordinates projected --normalize none, as it is written; options beside it win"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset == "paper":
            usual = {item.name: item.default for item in fields(self)}
            for name, value in PAPER.items():
                if getattr(self, name) == usual[name]:
                    object.__setattr__(self, name, value)
        if self.vectors == "fisher" and self.metric != "diagonal":
            raise UsageError("--vectors fisher needs the Fisher diagonal: use it with --metric diagonal")
        if self.shrinkage is not None and self.metric != "projected":
            raise UsageError("--shrinkage is of the projected metric: use it with --metric projected")


def merge_epimer(layer: Layer, config: EpiMerConfig, survey: None = None) -> LayerMerge:
    """Solve one layer: basis, metrics, coordinates, one linear system."""
    from hf_epimer.numerics.frechet import frechet_mean

    basis, rank = layer_basis(layer, config.rank)
    if basis is None:
        if config.vectors == "fisher" and not layer.is_matrix:
            fisher = merge_fisher(layer, FisherConfig(config.normalize, config.damping))
            return LayerMerge(fisher.task_vector * config.alpha, rank)
        return LayerMerge(layer.mean() * config.alpha, rank)
    metrics = layer_metrics(layer, basis, config)
    coordinates = _coordinates(basis, layer, config)
    if metrics.flat:
        solution, solve = layer.weights @ coordinates, SolveReport(eta=0.0, flat=True)
    else:
        mean = frechet_mean(metrics, coordinates, layer.weights, exact=layer.exact)
        solution = mean.value
        eta = mean.eta * metrics.scale
        as_measured = config.normalize == "none"
        curvature = tuple(metrics.scale * metrics.trace(t) for t in range(layer.tasks)) if as_measured else None
        solve = SolveReport(eta, curvature, steps=mean.steps, residual=mean.residual, condition=mean.condition)
    scale = config.alpha * (layer.tasks if config.aggregator == "sum" else 1)
    return LayerMerge(basis.expand(solution * scale), rank, solve)


def layer_metrics(layer: Layer, basis: TaggedBasis, config: EpiMerConfig) -> ProjectedMetrics:
    """The tasks' metrics on one layer, of the kind the config asks for.

    Raises:
        StatisticsError: the layer has no statistics of that kind.
    """
    from hf_epimer.numerics.metric import DenseMetrics, DiagonalMetrics, kronecker_metrics, shrunk

    if config.metric == "diagonal":
        v = layer.measured("fisher")
        return DiagonalMetrics(basis, v, layer.weights, damping=config.damping, normalize=config.normalize)
    if config.metric == "kronecker":
        metrics = kronecker_metrics(basis, layer.measured("input"), layer.measured("output"))
    else:
        metrics = shrunk(layer.measured("projected"), _shrinkage(layer, config))
    return DenseMetrics(metrics, layer.weights, damping=config.damping, normalize=config.normalize)


def _shrinkage(layer: Layer, config: EpiMerConfig) -> Tensor:
    estimated = layer.measured("shrinkage").flatten()
    return estimated if config.shrinkage is None else estimated.new_full(estimated.shape, config.shrinkage)


def _coordinates(basis: TaggedBasis, layer: Layer, config: EpiMerConfig) -> Tensor:
    from hf_epimer.numerics.subspace import projected_coordinates, tagged_coordinates

    if config.coordinates == "tagged":
        return tagged_coordinates(basis, layer.tasks)
    return projected_coordinates(basis, layer.task_vectors)


_STATISTICS = {"diagonal": FISHER_DIAGONAL, "projected": PROJECTED_FISHER, "kronecker": KRONECKER}

EPIMER = Method(
    "epimer",
    "Fréchet mean of the task vectors under their projected Fisher curvature",
    "W = W_0 + U diag(x) V^T,  x = alpha T (sum_t l_t H_t)^{-1} sum_t l_t H_t c_t,  H_t = S^T diag(v_t) S",
    Paper(
        "lu2026epimer",
        "Lu, Juanwu and Bhaskar, Anand and Axelrod, Brian and Tolstaya, Ekaterina and Emrich, Tristan",
        "Model Merging on Loss Landscape: A Geometry Perspective",
        "CVPR Findings",
        2026,
        "https://arxiv.org/abs/2605.26693",
    ),
    EpiMerConfig,
    merge_epimer,
    needs=FISHER_DIAGONAL,
    needs_with=lambda config: _STATISTICS[config.metric],
    title="EpiMer",
    core="both",
)
