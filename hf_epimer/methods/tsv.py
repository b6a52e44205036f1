"""TSV-M: sum of low-rank task vectors after whitening their singular vectors. Gargiulo et al., CVPR 2025.

    W = W_0 + alpha U diag(s) V^T,  U = polar([U_1 ... U_T]),  V = polar([V_1 ... V_T]),  s the singular values

The original keeps k = floor(min(m, n) / T) directions per task; EpiMer's comparison uses k = 32. Parameters that are
not matrices take the mean of the task vectors, times alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_epimer.methods.base import Layer, LayerMerge, Method, MethodConfig, Paper, option
from hf_epimer.numerics.subspace import TaggedBasis, capped_rank, tagged_basis


@dataclass(frozen=True)
class TSVMConfig(MethodConfig):
    """Options of `tsv-m`."""

    rank: int | None = option(None, "directions per task; default floor(min(m, n) / T), as in the paper", low=1)
    alpha: float = option(1.0, "global scale of the merged task vector")


def layer_basis(layer: Layer, rank: int | None) -> tuple[TaggedBasis | None, dict[str, Any]]:
    """The layer's tagged basis at the capped rank, and the report entries that go with it.

    None for parameters that are not matrices, matrices with fewer rows or columns than there are tasks, and layers
    that no task has changed.
    """
    if not layer.is_matrix:
        return None, {}
    shape = (int(layer.base.shape[0]), int(layer.base.shape[1]))
    k = capped_rank(rank or min(shape), shape, layer.tasks)
    report: dict[str, Any] = {"rank": k, "capped": rank is not None and k < rank}
    basis = layer.basis
    if basis is None and k:
        basis = tagged_basis(layer.task_vectors, k, exact=layer.exact, seed=layer.seed)
    return basis, report | {"atoms": basis.size if basis else 0}


def merge_tsv(layer: Layer, config: TSVMConfig, survey: None = None) -> LayerMerge:
    """alpha U diag(s T l_tag) V^T."""
    basis, report = layer_basis(layer, config.rank)
    if basis is None:
        return LayerMerge(layer.mean() * config.alpha, report)
    x = basis.s * layer.weights[basis.tags] * layer.tasks
    return LayerMerge(basis.expand(x * config.alpha), report)


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
)
