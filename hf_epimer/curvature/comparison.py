"""How good each approximation of a task's curvature is: against the exact Hessian on the tagged basis, layer by layer.

    agreement = <H, H_exact> / (|H| |H_exact|)      1 for the same matrix up to a factor
    scale     = tr H / tr H_exact                   a factor common to all tasks does not matter to the Fréchet mean

The exact Hessian takes p Hessian-vector products per layer and batch: for small models, small ranks and few samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_epimer.curvature.accumulators import Accumulator, FisherDiagonal, KroneckerFactors, ProjectedFisher
from hf_epimer.curvature.data_pass import accumulate
from hf_epimer.curvature.estimate import load_subject
from hf_epimer.curvature.hessian import projected_hessian
from hf_epimer.curvature.request import CurvatureRequest
from hf_epimer.numerics.metric import DiagonalMetrics, kronecker_metrics
from hf_epimer.numerics.subspace import TaggedBasis


@dataclass(frozen=True)
class Agreement:
    """Of one approximation, averaged over layers: `agreement` in [-1, 1], `scale` > 0."""

    agreement: float
    scale: float


def compare_with_hessian(
    request: CurvatureRequest, bases: Mapping[str, TaggedBasis], batch_size: int = 16
) -> dict[str, Agreement]:
    """The `diagonal`, `projected` and `kronecker` metrics of one checkpoint on its task, from the same samples.

    Args:
        bases: parameter -> basis; a few of a model's matrices do.
    """
    subject, batches = load_subject(request, batch_size, Accelerator())
    exact = projected_hessian(subject, batches, bases)
    makers: dict[str, Accumulator] = {
        "diagonal": FisherDiagonal(subject.shapes),
        "projected": ProjectedFisher(bases),
        "kronecker": KroneckerFactors(subject.shapes),
    }
    found = {name: accumulate(subject, batches, accumulator)[0] for name, accumulator in makers.items()}
    agreements = {}
    for name, statistics in found.items():
        pairs = [(_metric(name, statistics, parameter, basis), exact[parameter]) for parameter, basis in bases.items()]
        agreements[name] = Agreement(
            fmean(_cosine(one, two) for one, two in pairs),
            fmean(float(one.trace() / two.trace()) for one, two in pairs),
        )
    return agreements


def _metric(name: str, statistics: Mapping[str, Tensor], parameter: str, basis: TaggedBasis) -> Tensor:
    if name == "projected":
        return statistics[parameter]
    if name == "kronecker":
        factors = (statistics[f"{parameter}.{side}_factor"].unsqueeze(0) for side in ("input", "output"))
        return kronecker_metrics(basis, *factors)[0]
    metrics = DiagonalMetrics(basis, statistics[parameter].unsqueeze(0), torch.ones(1), damping=0.0)
    return metrics.dense() * metrics.scale


def _cosine(one: Tensor, two: Tensor) -> float:
    return float((one * two).sum() / (one.norm() * two.norm()).clamp_min(torch.finfo(one.dtype).tiny))
