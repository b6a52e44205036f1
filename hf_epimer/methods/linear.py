"""Weighted averages of whole task vectors: the arithmetic mean, task arithmetic, NAN.

mean                W_0 + sum l_t D_t                     Wortsman et al., ICML 2022
task-arithmetic     W_0 + alpha T sum l_t D_t             Ilharco et al., ICLR 2023; alpha sum D_t for equal l_t
nan                 W_0 + alpha sum q_t D_t,  q_t ~ l_t / ||theta_t||,  sum q_t = 1          Si et al., 2025
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_epimer.errors import UsageError
from hf_epimer.methods.base import Layer, LayerMerge, Method, MethodConfig, OverLayers, Paper, weighted_sum
from hf_epimer.methods.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MeanConfig(MethodConfig):
    """The arithmetic mean has no options."""


@dataclass(frozen=True)
class TaskArithmeticConfig(MethodConfig):
    """Options of `task-arithmetic`."""

    alpha: float = option(0.3, "scale of the summed task vectors; 1/T is the mean")


@dataclass(frozen=True)
class NANConfig(MethodConfig):
    """Options of `nan`."""

    alpha: float = option(1.0, "global scale of the merged task vector")
    norm: Literal["parameters", "task-vector"] = option("parameters", "whose norm: of theta_t or of theta_t - theta_0")


def merge_mean(layer: Layer, config: MeanConfig, survey: None = None) -> LayerMerge:
    """sum l_t D_t."""
    return LayerMerge(layer.mean())


def merge_task_arithmetic(layer: Layer, config: TaskArithmeticConfig, survey: None = None) -> LayerMerge:
    """alpha T sum l_t D_t."""
    return LayerMerge(layer.mean() * (config.alpha * layer.tasks))


def survey_norms(config: NANConfig, over_layers: OverLayers) -> Tensor:
    """Global norm of every model (or task vector), length T, float64."""
    import torch

    def squares(layer: Layer) -> Tensor:
        values = layer.task_vectors if config.norm == "task-vector" else layer.task_vectors + layer.base
        return values.reshape(layer.tasks, -1).norm(dim=1).double().square().cpu()

    total = torch.stack(list(over_layers(squares))).sum(0)
    if not bool((total > 0).all()):
        raise UsageError(f"nan cannot weigh a model whose {config.norm} norm is zero")
    return total.sqrt()


def merge_nan(layer: Layer, config: NANConfig, survey: Tensor) -> LayerMerge:
    """alpha sum q_t D_t with q_t proportional to l_t / norm_t."""
    coefficients = layer.weights / survey.to(layer.weights)
    coefficients = coefficients / coefficients.sum()
    return LayerMerge(weighted_sum(coefficients, layer.task_vectors) * config.alpha)


MEAN = Method(
    "mean",
    "plain average of the weights",
    "W = W_0 + sum_t l_t D_t",
    Paper(
        "wortsman2022model",
        "Wortsman, Mitchell and others",
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy "
        "without increasing inference time",
        "ICML",
        2022,
        "https://arxiv.org/abs/2203.05482",
    ),
    MeanConfig,
    merge_mean,
    entrywise=lambda config: True,
    title="Mean",
    core="both",
)

TASK_ARITHMETIC = Method(
    "task-arithmetic",
    "scaled sum of task vectors",
    "W = W_0 + alpha sum_t D_t",
    Paper(
        "ilharco2023editing",
        "Ilharco, Gabriel and others",
        "Editing Models with Task Arithmetic",
        "ICLR",
        2023,
        "https://arxiv.org/abs/2212.04089",
    ),
    TaskArithmeticConfig,
    merge_task_arithmetic,
    entrywise=lambda config: True,
    title="Task arithmetic",
    core="both",
)

NAN = Method(
    "nan",
    "average weighted by inverse parameter norms",
    "W = W_0 + alpha sum_t q_t D_t,  q_t proportional to l_t / ||theta_t||",
    Paper(
        "si2025nan",
        "Si, Chongjie and others",
        "NAN: A Training-Free Solution to Coefficient Estimation in Model Merging",
        "arXiv",
        2025,
        "https://arxiv.org/abs/2505.16148",
    ),
    NANConfig,
    merge_nan,
    survey=survey_norms,
    entrywise=lambda config: True,
    title="NAN",
)
