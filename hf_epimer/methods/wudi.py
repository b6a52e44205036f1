"""WUDI: the merge whose interference with every task vector is least, without data. Cheng et al., ICML 2025.

    minimise over D:  sum_t |(D - D_t) D_t^T|^2 / |D_t|^2,    begun at the sum of task vectors
    D = sum_t D_t + E,    E (sum_t A_t + rho) = sum_t (D_t - sum_s D_s) A_t,    A_t = D_t^T D_t / |D_t|^2

The rows of D_t stand in for the inputs of task t: it is RegMean with A_t in the place of the Gram matrices. The paper
takes 300 steps of Adam, which leave directions of small curvature near the start; here the quadratic is solved, and
`damping` (in units of the mean curvature) does the same. Without it the merge is useless: the exact minimum goes far
along directions that hardly any task has taken. With weights l_t every D_t counts as T l_t D_t in the start,
and T l_t times in the objective. Parameters that are no matrices take the mean of the task vectors, times alpha.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_epimer.methods.base import Layer, LayerMerge, Method, MethodConfig, Paper, weighted_sum
from hf_epimer.methods.options import option


@dataclass(frozen=True)
class WUDIConfig(MethodConfig):
    """Options of `wudi`."""

    alpha: float = option(1.0, "global scale of the merged task vector")
    damping: float = option(0.1, "added to the curvature, relative to its mean; large values give the start", low=0.0)


def merge_wudi(layer: Layer, config: WUDIConfig, survey: None = None) -> LayerMerge:
    """Solve one layer in float64."""
    import torch

    if not layer.is_matrix or not bool(layer.norms.any()):
        return LayerMerge(layer.mean() * config.alpha)
    deltas = layer.task_vectors.double()
    start = layer.mean().double() * layer.tasks
    norms = deltas.square().sum((1, 2))
    gains = layer.weights.double() * torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    grams = gains[:, None, None] * (deltas.mT @ deltas)
    total = grams.sum(0)
    values, vectors = torch.linalg.eigh(total)
    values = values.clamp_min(0) + config.damping * values.mean()
    kept = values > 1e-12 * values[-1]  # where no task vector reaches there is nothing to correct
    wanted = weighted_sum(torch.ones_like(gains), (deltas - start) @ grams)
    step = (wanted @ vectors[:, kept] / values[kept]) @ vectors[:, kept].mT
    return LayerMerge((start + step).to(layer.base.dtype) * config.alpha)


WUDI = Method(
    "wudi",
    "least interference with every task vector, without data",
    "W = W_0 + alpha argmin_D sum_t |(D - D_t) D_t^T|^2 / |D_t|^2",
    Paper(
        "cheng2025whoever",
        "Cheng, Runxi and others",
        "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
        "ICML",
        2025,
        "https://arxiv.org/abs/2503.08099",
    ),
    WUDIConfig,
    merge_wudi,
    title="WUDI",
)
