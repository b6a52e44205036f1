"""Isotropic merging: flatten the spectrum of the summed task vectors. Marczak et al., ICML 2025.

    iso-c     sum D_t = U diag(s) V^T;   W = W_0 + alpha mean(s) U V^T
    iso-cts   keep the leading `common` share of those directions, fill the rest with every task's leading directions
              outside them, whiten both sides (polar), flat spectrum

Parameters that are not matrices take the mean of the task vectors, times alpha.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_epimer.methods.base import Layer, LayerMerge, Method, MethodConfig, Paper
from hf_epimer.methods.options import option
from hf_epimer.methods.report import RankReport


@dataclass(frozen=True)
class IsoCConfig(MethodConfig):
    """Options of `iso-c`."""

    alpha: float = option(1.0, "global scale of the merged task vector")


@dataclass(frozen=True)
class IsoCTSConfig(MethodConfig):
    """Options of `iso-cts`."""

    alpha: float = option(1.0, "global scale of the merged task vector")
    common: float = option(0.8, "share of the directions taken from the summed task vectors", low=0.0, high=1.0)


def merge_iso_c(layer: Layer, config: IsoCConfig, survey: None = None) -> LayerMerge:
    """alpha mean(s) U V^T over the directions that the sum really has."""
    import torch

    mean = layer.mean()
    if not layer.is_matrix or not bool(mean.any()):
        return LayerMerge(mean * config.alpha)
    u, s, vh = torch.linalg.svd(mean * layer.tasks, full_matrices=False)
    kept = s > _NULL * s[0]  # a null direction has no orientation: giving it mean(s) would add noise
    return LayerMerge((u[:, kept] @ vh[kept]) * (config.alpha * s.mean()))


def merge_iso_cts(layer: Layer, config: IsoCTSConfig, survey: None = None) -> LayerMerge:
    """Common and task-specific directions with one flat spectrum."""
    import torch

    from hf_epimer.numerics.linalg import polar_factor, truncated_svd

    total = layer.mean() * layer.tasks
    if not layer.is_matrix or not bool(total.any()):
        return LayerMerge(layer.mean() * config.alpha)
    smaller = min(total.shape)
    specific = round((smaller - int(smaller * config.common)) / layer.tasks)
    if specific * layer.tasks > smaller:
        specific = smaller // layer.tasks
    common = smaller - specific * layer.tasks
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    us, ss, vs = [u[:, :common]], [s[:common]], [vh[:common].mT]
    for task_vector in layer.task_vectors:
        outside = task_vector - us[0] @ (us[0].mT @ task_vector)
        if specific and bool(outside.any()):
            svd = truncated_svd(outside, specific, exact=layer.exact, seed=layer.seed)
            us.append(svd.u)
            ss.append(svd.s)
            vs.append(svd.v)
    spectrum = torch.cat(ss)
    kept = spectrum > _NULL * spectrum.max()
    left = polar_factor(torch.cat(us, dim=1)[:, kept], exact=True)
    right = polar_factor(torch.cat(vs, dim=1)[:, kept], exact=True)
    task_vector = (left @ right.mT) * (config.alpha * spectrum.mean())
    return LayerMerge(task_vector, RankReport(common=common, specific=specific))


_NULL = 1e-6
"""Relative singular value below which a direction is rounding."""

_PAPER = Paper(
    "marczak2025task",
    "Marczak, Daniel and others",
    "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    "ICML",
    2025,
    "https://arxiv.org/abs/2502.04959",
)

ISO_C = Method(
    "iso-c",
    "summed task vectors with a flat spectrum",
    "W = W_0 + alpha mean(s) U V^T,  sum_t D_t = U diag(s) V^T",
    _PAPER,
    IsoCConfig,
    merge_iso_c,
    title="Iso-C",
    core="both",
)

ISO_CTS = Method(
    "iso-cts",
    "flat spectrum over common and task-specific directions",
    "W = W_0 + alpha mean(s) polar([U_c U_1 .. U_T]) polar([V_c V_1 .. V_T])^T",
    _PAPER,
    IsoCTSConfig,
    merge_iso_cts,
    title="Iso-CTS",
    core="both",
)
