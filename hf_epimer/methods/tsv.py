"""TSV-M: sum of low-rank task vectors after whitening their singular vectors. Gargiulo et al., CVPR 2025.

    W = W_0 + alpha U diag(s) V^T,  U = polar([U_1 ... U_T]),  V = polar([V_1 ... V_T]),  s the singular values

The original keeps k = floor(min(m, n) / T) directions per task; EpiMer's comparison uses k = 32. Parameters that are
not matrices take the mean of the task vectors, times alpha.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_epimer.methods.base import Layer, LayerMerge, Method, MethodConfig, Paper
from hf_epimer.methods.basis import layer_basis
from hf_epimer.methods.options import option


@dataclass(frozen=True)
class TSVMConfig(MethodConfig):
    """Options of `tsv-m`."""

    rank: int | None = option(None, "directions per task; default floor(min(m, n) / T), as in the paper", low=1)
    alpha: float = option(1.0, "global scale of the merged task vector")


def merge_tsv(layer: Layer, config: TSVMConfig, survey: None = None) -> LayerMerge:
    """alpha U diag(s T l_tag) V^T."""
    basis, rank = layer_basis(layer, config.rank)
    if basis is None:
        return LayerMerge(layer.mean() * config.alpha, rank)
    x = basis.s * layer.weights[basis.tags] * layer.tasks
    return LayerMerge(basis.expand(x * config.alpha), rank)


TSV_M = Method(
    "tsv-m",
    "sum of low-rank task vectors with whitened singular vectors",
    "W = W_0 + alpha U diag(s) V^T,  U = polar([U_1 .. U_T]),  V = polar([V_1 .. V_T])",
    Paper(
        "gargiulo2025task",
        "Gargiulo, Antonio Andrea and others",
        "Task Singular Vectors: Reducing Task Interference in Model Merging",
        "CVPR",
        2025,
        "https://arxiv.org/abs/2412.00081",
    ),
    TSVMConfig,
    merge_tsv,
    title="TSV-M",
    core="both",
)
