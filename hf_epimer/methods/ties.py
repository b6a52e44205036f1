"""TIES-Merging: trim, elect signs, average what agrees. Yadav et al., NeurIPS 2023.

    trim    keep the `density` largest |D_t| of task t, over the whole model (or per layer); the rest is 0
    elect   sign per entry: of sum l_t D_t (`mass`) or of sum l_t sign(D_t) (`count`)
    merge   average of the kept entries that carry the elected sign, times alpha

The model-wide threshold is exact; `hf_epimer.numerics.trimming` says how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_epimer.errors import UsageError
from hf_epimer.methods.base import Layer, LayerMerge, Method, MethodConfig, OverLayers, Paper
from hf_epimer.methods.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TIESConfig(MethodConfig):
    """Options of `ties`."""

    density: float = option(0.2, "share of entries kept per task", low=0.0, high=1.0)
    alpha: float = option(1.0, "global scale of the merged task vector")
    election: Literal["mass", "count"] = option("mass", "sign by summed values (TIES) or by votes (EpiMer's baseline)")
    trim: Literal["model", "layer"] = option("model", "keep the largest entries of the whole model or of each layer")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density == 0:
            raise UsageError("--density must be above 0: nothing would be kept")


def survey_thresholds(config: TIESConfig, over_layers: OverLayers) -> Tensor | None:
    """The smallest kept |D_t| over the whole model, length T; None when trimming per layer."""
    from hf_epimer.numerics.trimming import model_thresholds

    if config.trim == "layer":
        return None

    def over_task_vectors(look: Callable[[Tensor], Any], step: int) -> Iterable[Any]:
        return over_layers(lambda layer: look(layer.task_vectors), step)

    return model_thresholds(over_task_vectors, config.density)


def merge_ties(layer: Layer, config: TIESConfig, survey: Tensor | None) -> LayerMerge:
    """Trim, elect and average one layer."""
    from hf_epimer.numerics.trimming import elect_and_average, layer_thresholds

    thresholds = layer_thresholds(layer.task_vectors, config.density) if survey is None else survey
    average = elect_and_average(layer.task_vectors, layer.weights, config.election, thresholds)
    return LayerMerge(average.mul_(config.alpha))


TIES = Method(
    "ties",
    "trim small changes, elect signs, average what agrees",
    "W = W_0 + alpha mean of { trim(D_t) : sign = elected sign }",
    Paper(
        "yadav2023ties",
        "Yadav, Prateek and others",
        "TIES-Merging: Resolving Interference When Merging Models",
        "NeurIPS",
        2023,
        "https://arxiv.org/abs/2306.01708",
    ),
    TIESConfig,
    merge_ties,
    survey=survey_thresholds,
    entrywise=lambda config: config.trim == "model",
    title="TIES",
    core="both",
)
