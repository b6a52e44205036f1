"""EpiMer in closed form on whole layers: our extension of the paper's method, which is `epimer`.

    W = W_0 + alpha D,   D = D_0 + (sum_t l_t (D_t - D_0) M_t) (sum_t l_t M_t + r)^{-1}
    M_t ~ h_t u(A_t) + mixture u(D_t^T D_t),   u(M) = M / mean(diag M),   A_t = E[sum_s |g_s|^2 x_s x_s^T]

x_s is the layer's input and g_s the gradient of the loss at its output, at position s; M_t is scaled to curvature 1
along D_t, and r is rho times the mean curvature. D minimises sum_t l_t tr((D - D_t) M_t (D - D_t)^T) + r |D - D_0|^2:
the Fréchet mean (eq 13) under the metrics I (x) M_t, in the whole space of the layer instead of the tagged basis
(`hf_epimer.numerics.input_metric`).

Why these metrics: A_t counts an input by how much the loss hears of it, where a plain Gram matrix counts positions that
nobody reads. D_t is what training summed up, sum of g x^T, so that D_t^T D_t holds the inputs weighted by how far they
moved the layer in the whole of the training. Each fills directions that the other leaves empty.

First D_t loses its spikes (`cap`, `hf_epimer.numerics.spikes`): one spiked checkpoint spoils the merge of all. Where a
share of it was cut, its curvature is heard less, h_t = (1 - share / `UNHEARD`)_+: I (x) A_t claims every direction of
the outputs, and a checkpoint that has moved along few needs only those.

`metric="curvature"` takes A_t alone, `metric="task-vectors"` D_t^T D_t alone, which needs no data. A task without
A_t, and a matrix that has none (an embedding), goes by its task vector. Parameters that are no matrices take the mean.

Relatives: RegMean (M_t = E[x x^T], rho = 0), WUDI (M_t ~ D_t^T D_t, from the sum), FeatCal (an anchored regression).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from hf_epimer.methods.base import Layer, LayerMerge, Method, MethodConfig
from hf_epimer.methods.basis import USUAL
from hf_epimer.methods.epimer import EPIMER
from hf_epimer.methods.options import option
from hf_epimer.methods.report import RankReport
from hf_epimer.methods.statistic import GRADIENT_GRAM, StatisticKind
from hf_epimer.methods.tsv import TSVMConfig, merge_tsv

if TYPE_CHECKING:
    from torch import Tensor

    from hf_epimer.numerics.input_metric import InputMetric


UNHEARD = 0.1
"""Share of a layer's task vector that stands out among the tasks from which on its curvature is left out."""


@dataclass(frozen=True)
class EpiMerCoreConfig(MethodConfig):
    """Options of `epimer-core`."""

    alpha: float = option(1.0, "global scale of the merged task vector")
    metric: Literal["curvature+task-vectors", "curvature", "task-vectors"] = option(
        "curvature+task-vectors", "gradient-weighted inputs and task vectors, or one alone (the latter needs no data)"
    )
    rho: float = option(0.1, "strength of the pull towards the start, in units of the mean curvature", low=1e-9)
    start: Literal["sum", "tsv-m"] = option("sum", "where it goes: the sum, shorter where task vectors agree, or TSV-M")
    cap: float = option(
        USUAL, "largest leading singular value of a task vector, in units of the tasks' median; cuts spikes", low=1.0
    )
    mixture: float = option(1.0, "weight of the task vectors beside the curvature, which has 1", low=0.0)


def merge_epimer_core(layer: Layer, config: EpiMerCoreConfig, survey: None = None) -> LayerMerge:
    """Solve one layer: cut spikes; a start, one metric per task, one n x n system."""
    from hf_epimer.numerics.input_metric import anchored_mean
    from hf_epimer.numerics.spikes import without_spikes

    if not layer.is_matrix or not bool(layer.norms.any()):
        return LayerMerge(layer.mean() * config.alpha)
    cut, gone = without_spikes(layer.task_vectors, config.cap, exact=layer.exact, seed=layer.seed)
    layer = replace(layer, task_vectors=cut)
    heard = (1 - gone / UNHEARD).clamp_min(0).tolist()
    start = _start(layer, config.start)
    merged = anchored_mean(layer.task_vectors, _metrics(layer, config, heard), layer.weights, start, config.rho)
    return LayerMerge(merged * config.alpha, RankReport(spikes=tuple(gone.tolist())))


def _start(layer: Layer, name: str) -> Tensor:
    """D_0. Both give a model that is merged with itself back, which the plain sum does not."""
    from hf_epimer.numerics.input_metric import agreed_sum

    if name == "tsv-m":
        return merge_tsv(layer, TSVMConfig()).task_vector
    return agreed_sum(layer.task_vectors, layer.weights)


def _metrics(layer: Layer, config: EpiMerCoreConfig, heard: Sequence[float]) -> list[InputMetric]:
    """M_t, with h_t of every task."""
    from hf_epimer.numerics.input_metric import InputMetric

    measured = layer.statistics.get("gradient")
    metrics = []
    for task in range(layer.tasks):
        curvature = None if measured is None or config.metric == "task-vectors" else measured[task]
        if curvature is None or not bool(curvature.any()):
            metrics.append(InputMetric())
        elif config.metric == "curvature":
            metrics.append(InputMetric(curvature, mixture=0.0))
        else:
            metrics.append(InputMetric(curvature, heard[task], config.mixture))
    return metrics


def _statistic(config: EpiMerCoreConfig) -> StatisticKind | None:
    return None if config.metric == "task-vectors" else GRADIENT_GRAM


EPIMER_CORE = Method(
    "epimer-core",
    "EpiMer on whole layers in closed form, from curvature and task vectors (ours)",
    "W = W_0 + alpha D,  D = D_0 + (sum_t l_t (D_t - D_0) M_t)(sum_t l_t M_t + rho)^{-1}",
    replace(EPIMER.paper, extension="the closed form on whole layers is an extension by hf-epimer"),
    EpiMerCoreConfig,
    merge_epimer_core,
    needs=GRADIENT_GRAM,
    needs_with=_statistic,
    does_without=True,
    calibrates=True,
    title="EpiMer core",
    core="outputs",
)
