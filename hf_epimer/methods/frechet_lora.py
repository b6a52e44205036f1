"""Fréchet means of low-rank adapters: B_t A_t is defined up to (B_t G, G^{-1} A_t), and so is the mean.

    D = alpha Mean(B_1 A_1 .. B_T A_T; l_t) on the quotient by GL(r); averages of B_t and A_t themselves depend on G

    chordal      the mean of the matrices, rank sum r_t (or `common_rank`)       polar        subspaces and scales apart
    procrustes   balanced factors, rotated onto each other                       riemannian   scale-free quotient metric

The formulas are in `hf_epimer.numerics.lowrank`. With `metric="kronecker"` the chordal mean is weighted by curvature
(Fisher merging on the adapters' common space): argmin sum l_t tr(S_t (M - M_t) A_t (M - M_t)^T), a generalised
Sylvester equation. da Silva, Adnan, Dangel and Oore, "Generalizing the Geometry of Model Merging Through Fréchet
Averages", arXiv 2604.27155, its case of LoRA adapters.

Works on any layer; task vectors that are no adapters count as matrices of their numerical rank. Parameters that are
not matrices take the mean of the task vectors, times alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_epimer.errors import UsageError
from hf_epimer.methods.base import Layer, LayerMerge, Method, MethodConfig, Paper
from hf_epimer.methods.options import option
from hf_epimer.methods.report import SolveReport
from hf_epimer.methods.statistic import KRONECKER

if TYPE_CHECKING:
    from torch import Tensor

    from hf_epimer.numerics.lowrank import LowRank


@dataclass(frozen=True)
class FrechetLoraConfig(MethodConfig):
    """Options of `frechet-lora`."""

    lora_mean: Literal["chordal", "procrustes", "polar", "log-polar", "riemannian"] = option(
        "chordal", "which mean of B_t A_t is taken"
    )
    alpha: float = option(1.0, "global scale of the merged task vector")
    common_rank: int | None = option(
        None, "largest rank of the mean; default that of the largest adapter, for chordal the sum of all", low=1
    )
    metric: Literal["flat", "kronecker"] = option("flat", "chordal only: weigh directions by Kronecker curvature")
    normalize: Literal["none", "trace"] = option("none", "divide every task's metric by its trace, per layer")
    damping: float = option(1e-6, "added to the curvature, relative to its mean; large values give the mean", low=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric != "flat" and self.lora_mean != "chordal":
            raise UsageError(f"--metric {self.metric} weighs the chordal mean: use it with --lora-mean chordal")


def merge_frechet_lora(layer: Layer, config: FrechetLoraConfig, survey: None = None) -> LayerMerge:
    """alpha times the mean of one layer."""
    from hf_epimer.numerics.lowrank import low_rank_mean

    if not layer.is_matrix or not bool(layer.norms.any()):
        return LayerMerge(layer.mean() * config.alpha)
    if config.metric == "kronecker":
        return _merge_curved(layer, config)
    if config.lora_mean == "chordal" and config.common_rank is None:  # nothing is cut off: the mean as it is
        return LayerMerge(layer.mean() * config.alpha)
    points = layer.factors or tuple(map(_factorized, layer.task_vectors))
    mean = low_rank_mean(config.lora_mean, points, layer.weights.double(), config.common_rank)
    solve = SolveReport(
        steps=mean.steps, residual=mean.residual, angle=mean.angle, unique=mean.unique, note=mean.note or None
    )
    return LayerMerge(mean.value.dense().to(layer.base.dtype) * config.alpha, solve=solve)


def _factorized(task_vector: Tensor) -> LowRank:
    """Thin SVD in float64, cut where the rounding of the task vector's own precision begins."""
    from hf_epimer.numerics.lowrank import LowRank, factorize

    thin = factorize(task_vector)
    return LowRank(thin.u.double(), thin.s.double(), thin.v.double())


def _merge_curved(layer: Layer, config: FrechetLoraConfig) -> LayerMerge:
    from hf_epimer.numerics.lowrank import factorize
    from hf_epimer.numerics.lowrank.sylvester import kronecker_mean

    mean = kronecker_mean(
        layer.task_vectors.double(),
        layer.measured("output").double(),
        layer.measured("input").double(),
        layer.weights.double(),
        damping=config.damping,
        normalize=config.normalize,
    )
    value = mean.value
    if config.common_rank is not None:
        value = factorize(value).truncated(config.common_rank).dense()
    solve = SolveReport(eta=mean.eta, steps=mean.steps, residual=mean.residual, condition=mean.condition)
    return LayerMerge(value.to(layer.base.dtype) * config.alpha, solve=solve)


FRECHET_LORA = Method(
    "frechet-lora",
    "Fréchet mean of low-rank adapters on their quotient manifold",
    "W = W_0 + alpha Mean(B_1 A_1 .. B_T A_T; l_t), invariant under (B_t G, G^{-1} A_t)",
    Paper(
        "dasilva2026geomerge",
        "da Silva, Marvin F. and Adnan, Mohammed and Dangel, Felix and Oore, Sageev",
        "Generalizing the Geometry of Model Merging Through Fréchet Averages",
        "arXiv",
        2026,
        "https://arxiv.org/abs/2604.27155",
    ),
    FrechetLoraConfig,
    merge_frechet_lora,
    needs_with=lambda config: KRONECKER if config.metric == "kronecker" else None,
    title="Fréchet mean of adapters",
    core="both",
)
