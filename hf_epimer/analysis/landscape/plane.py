"""The plane that fits fine-tuned models best, from inner products of their task vectors.

    theta_bar = W_0 + sum_t D_t / T                     the mean of the models, whatever weights they are merged with
    e_1, e_2    the leading principal axes of the theta_t - theta_bar; e_j = sum_t A_jt D_t,  A_j = P^T u_j / sqrt(s_j)
                (s_j, u_j) of the T x T matrix P G P^T,  G_st = <D_s, D_t>,  P = I - 1/T                   PCA by Gram

G adds up over layers, so all models are read once, one layer at a time. Everything else (the base, merges) is
projected: what is drawn lies in the plane, and how far from it a model really is stands beside it. Three models span
their plane; two have one principal axis only, and the second then points at the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.errors import UsageError
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.stream import stream_layers
from hf_epimer.methods import Layer

BASE = "base"

Point = tuple[float, float]


@dataclass(frozen=True)
class Plane:
    """A plane through the mean of the fine-tuned models.

    Attributes:
        labels: of the fine-tuned models.
        axes: A, 2 x T in float64: e_j = sum_t A_jt D_t, orthonormal.
        positions: name -> (a, b), the projection of every model: the fine-tuned ones, the base, merges.
        outside: name -> its distance from the plane.
        explained: the share of the spread of the fine-tuned models that lies in the plane, in [0, 1].
    """

    labels: tuple[str, ...]
    axes: Tensor
    positions: dict[str, Point]
    outside: dict[str, float]
    explained: float


def plane_of(ingredients: Ingredients, marked: Sequence[TensorSource] = ()) -> Plane:
    """The plane of the fine-tuned models, with the places of the base and of other models in it: one pass.

    Raises:
        UsageError: all models lie on one line.
    """
    everything = replace(
        ingredients,
        models=[*ingredients.models, *marked],
        weights=[1.0] * (len(ingredients.models) + len(marked)),
        statistics=None,
    )
    gram = torch.stack(list(stream_layers(everything, _gram))).sum(0)
    return fit_plane(gram, [model.label for model in ingredients.models], [model.label for model in marked])


def fit_plane(gram: Tensor, labels: Sequence[str], marked: Sequence[str] = ()) -> Plane:
    """The plane from inner products alone.

    Args:
        gram: <D_s, D_t> in float64, of the T fine-tuned models and behind them of the marked ones.
        labels: of the former.
        marked: of the latter.

    Raises:
        UsageError: all models lie on one line.
    """
    tasks, size = len(labels), len(gram)
    # a point is a row of coefficients over all task vectors, from the mean of the models; the base is where D = 0
    points = torch.cat([torch.eye(size, dtype=gram.dtype), torch.zeros(1, size, dtype=gram.dtype)])
    points[:, :tasks] -= 1 / tasks
    spread, directions = torch.linalg.eigh(points[:tasks] @ gram @ points[:tasks].mT)
    spread, directions = spread.flip(0).clamp_min(0), directions.flip(1)
    if float(spread[0]) <= _ON_A_LINE * float(gram.diagonal().amax()):
        raise UsageError("all checkpoints are the same: they span no plane")
    axes = [directions[:, 0] @ points[:tasks] / spread[0].sqrt()]
    if tasks > 2 and float(spread[1]) > _ON_A_LINE * float(spread[0]):
        axes.append(directions[:, 1] @ points[:tasks] / spread[1].sqrt())
    else:
        rest = points[-1] - (points[-1] @ gram @ axes[0]) * axes[0]
        length = float((rest @ gram @ rest).clamp_min(0))
        if length <= _ON_A_LINE * float(spread[0]):
            raise UsageError("the checkpoints and their base lie on one line: they span no plane")
        axes.append(rest / math.sqrt(length))
    basis = torch.stack(axes)
    places = points @ gram @ basis.mT
    signs = torch.stack([_sign(places[:tasks, axis]) for axis in range(2)])
    basis, places = basis * signs[:, None], places * signs
    squared = torch.einsum("is,st,it->i", points, gram, points) - places.square().sum(1)
    names = [*labels, *marked, BASE]
    return Plane(
        labels=tuple(labels),
        axes=basis[:, :tasks],
        positions={name: (float(a), float(b)) for name, (a, b) in zip(names, places)},
        outside={name: math.sqrt(max(0.0, float(square))) for name, square in zip(names, squared)},
        explained=float(spread[:2].sum() / spread.sum()),
    )


_ON_A_LINE = 1e-10
"""Squared length of a direction, relative to the longest, below which it is rounding."""


def _sign(coordinates: Tensor) -> Tensor:
    """Axes point at the farthest model (of equally far ones at the first): eigenvectors come with either sign."""
    sizes = coordinates.abs()
    farthest = int((sizes > (1 - 1e-6) * sizes.amax()).to(torch.uint8).argmax())
    return coordinates.new_tensor(1.0 if coordinates[farthest] >= 0 else -1.0)


def _gram(layer: Layer) -> Tensor:
    # in float64, a piece at a time: distances from the plane are small differences of large numbers
    gram = torch.zeros(layer.tasks, layer.tasks, dtype=torch.float64)
    for piece in layer.task_vectors.flatten(1).split(1 << 18, dim=1):
        gram += piece.double() @ piece.double().mT
    return gram


def grid(points: Sequence[Point], steps: int, margin: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Values of a and of b, `steps` of each: a square, so that distances look alike in both directions."""
    lows, highs = [min(values) for values in zip(*points)], [max(values) for values in zip(*points)]
    half = (0.5 + margin) * max(high - low for low, high in zip(lows, highs))
    shares = [2 * step / (steps - 1) - 1 for step in range(steps)]
    first, second = (tuple((low + high) / 2 + half * share for share in shares) for low, high in zip(lows, highs))
    return first, second
