"""RegMean: match every linear layer's outputs on every task's inputs in closed form. Jin et al., ICLR 2023.

    W = (sum l_t W_t A_t)(sum l_t A_t)^{-1},  A_t = E[x x^T] with off-diagonals times `decay`

For a weight that acts as y = W x (m x n), A_t is the n x n Gram matrix of the layer's inputs. In task vectors
W = W_0 + (sum l_t D_t A_t)(sum l_t A_t)^{-1}. Parameters without a Gram matrix take the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_epimer.methods.base import Layer, LayerMerge, Method, MethodConfig, Paper, weighted_sum
from hf_epimer.methods.options import option
from hf_epimer.methods.report import SolveReport
from hf_epimer.methods.statistic import GRAM


@dataclass(frozen=True)
class RegMeanConfig(MethodConfig):
    """Options of `regmean`."""

    decay: float = option(0.95, "factor on the off-diagonal entries of the Gram matrices", low=0.0, high=1.0)
    damping: float = option(1e-6, "added to the diagonal, relative to its mean", low=0.0)


def merge_regmean(layer: Layer, config: RegMeanConfig, survey: None = None) -> LayerMerge:
    """Solve the regression of one linear layer in float64."""
    import torch

    if "input" not in layer.statistics or not layer.is_matrix:
        return LayerMerge(layer.mean())
    grams = layer.statistics["input"].double()
    grams = config.decay * grams + (1 - config.decay) * torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    weights = layer.weights.double()
    ridge = config.damping * weighted_sum(weights, grams).diagonal().mean()
    grams = grams + ridge * torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    factor, failed = torch.linalg.cholesky_ex(weighted_sum(weights, grams))
    if bool(failed):  # inputs that never move in some direction: nothing to regress on without a ridge
        return LayerMerge(layer.mean(), solve=SolveReport(singular=True))
    weighted = weighted_sum(weights, layer.task_vectors.double() @ grams)
    return LayerMerge(torch.cholesky_solve(weighted.mT, factor).mT.to(layer.base.dtype))


REGMEAN = Method(
    "regmean",
    "least-squares match of every linear layer's outputs",
    "W = (sum_t l_t W_t A_t)(sum_t l_t A_t)^{-1},  A_t = E[x x^T]",
    Paper(
        "jin2023dataless",
        "Jin, Xisen and others",
        "Dataless Knowledge Fusion by Merging Weights of Language Models",
        "ICLR",
        2023,
        "https://arxiv.org/abs/2212.09849",
    ),
    RegMeanConfig,
    merge_regmean,
    needs=GRAM,
    title="RegMean",
    core="outputs",
)
