"""Averages weighted entry by entry with the diagonal Fisher: Fisher averaging and gradient matching.

    fisher              W = W_0 + (sum l_t f_t o D_t) / (sum l_t f_t),  f_t = v_t + rho mean(v)   Matena & Raffel, 2022
    gradient-matching   W = W_0 + alpha (sum l_t h_t o D_t) / (sum l_t h_t),  h_t = v_t + delta_0   Daheim et al., 2024

Both are the Fréchet mean with S = I and a diagonal metric (EpiMer, Proposition 2, cases 2 and 3).

`normalize="trace"` first brings v_t of all tasks to one mean, per parameter: a task's Fisher information grows with its
loss, and as it is (`none`, the papers' formulas) the task with the worst fit has the last word everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_epimer.methods.base import Layer, LayerMerge, Method, MethodConfig, Paper, weighted_sum
from hf_epimer.methods.options import option
from hf_epimer.methods.statistic import FISHER_DIAGONAL

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FisherConfig(MethodConfig):
    """Options of `fisher`."""

    normalize: Literal["none", "trace"] = option("trace", "bring every task's Fisher to one mean, per layer")
    damping: float = option(1e-6, "floor of the Fisher values, relative to the layer's mean", low=0.0)


@dataclass(frozen=True)
class GradientMatchingConfig(MethodConfig):
    """Options of `gradient-matching`."""

    alpha: float = option(1.0, "global scale of the merged task vector")
    normalize: Literal["none", "trace"] = option("trace", "bring every task's Fisher to one mean, per layer")
    prior_precision: float = option(1e-8, "delta_0, the precision of the prior, in units of the Fisher", low=0.0)


def curvature_weighted_mean(layer: Layer, curvature: Tensor) -> Tensor:
    """(sum l_t h_t o D_t) / (sum l_t h_t) entry by entry; the plain mean where no task has any curvature.

    Args:
        curvature: h_t >= 0, T x the shape of W_0.
    """
    import torch

    total = weighted_sum(layer.weights, curvature)
    weighted = weighted_sum(layer.weights, curvature * layer.task_vectors)
    tiny = torch.finfo(total.dtype).tiny
    return torch.where(total > tiny, weighted / total.clamp_min(tiny), layer.mean())


def merge_fisher(layer: Layer, config: FisherConfig, survey: None = None) -> LayerMerge:
    """Fisher-weighted averaging of one parameter, floored so that no entry is 0 / 0."""
    v = _scaled(_fisher(layer, config.normalize), layer.weights)
    return LayerMerge(curvature_weighted_mean(layer, v + config.damping))


def merge_gradient_matching(layer: Layer, config: GradientMatchingConfig, survey: None = None) -> LayerMerge:
    """Uncertainty-based gradient matching in its diagonal form."""
    # float64: an absolute precision cannot be rescaled away, and squares of 1e-12 leave float32's range
    h = _fisher(layer, config.normalize).double() + config.prior_precision
    doubled = Layer(
        layer.name, layer.base, layer.task_vectors.double(), layer.weights.double(), layer.is_matrix, layer.labels
    )
    return LayerMerge(curvature_weighted_mean(doubled, h).to(layer.base.dtype) * config.alpha)


def _fisher(layer: Layer, normalize: str) -> Tensor:
    """v_t, each times mean(v) / mean(v_t) where tasks are to be on one scale."""
    v = layer.measured("fisher")
    if normalize == "none":
        return v
    rows = v.double().reshape(len(v), -1)  # float64: values of 1e-30 are no rarity, nor is a task of none at all
    means = rows.mean(1, keepdim=True)
    return (rows * (means.mean() / means).where(means > 0, 0.0)).view(v.shape).to(v.dtype)


def _scaled(v: Tensor, weights: Tensor) -> Tensor:
    """v_t over the layer's mean, so that nothing is denormal."""
    mean = weighted_sum(weights, v).mean()
    return v / mean if bool(mean > 0) else v.new_zeros(v.shape)


FISHER = Method(
    "fisher",
    "average weighted by the diagonal Fisher information",
    "W = W_0 + (sum_t l_t v_t o D_t) / (sum_t l_t v_t)",
    Paper(
        "matena2022merging",
        "Matena, Michael and Raffel, Colin",
        "Merging Models with Fisher-Weighted Averaging",
        "NeurIPS",
        2022,
        "https://arxiv.org/abs/2111.09832",
    ),
    FisherConfig,
    merge_fisher,
    needs=FISHER_DIAGONAL,
    title="Fisher averaging",
)

GRADIENT_MATCHING = Method(
    "gradient-matching",
    "Fisher averaging with a prior: matches the joint model's gradients",
    "W = W_0 + alpha (sum_t l_t h_t o D_t) / (sum_t l_t h_t),  h_t = v_t + delta_0",
    Paper(
        "daheim2024model",
        "Daheim, Nico and others",
        "Model Merging by Uncertainty-Based Gradient Matching",
        "ICLR",
        2024,
        "https://arxiv.org/abs/2310.12808",
    ),
    GradientMatchingConfig,
    merge_gradient_matching,
    needs=FISHER_DIAGONAL,
    title="Gradient matching",
)
