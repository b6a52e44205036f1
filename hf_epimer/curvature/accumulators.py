"""What is summed up from per-sample gradients G_n = sum_t left[n, t] right[n, t]^T, and what the sums become.

    FisherDiagonal     (1/N) sum_n G_n o G_n                                       shaped like the parameter   (eq 9)
    SquaredMean        ((1/N) sum_n G_n) o itself: the paper's weak baseline       shaped like the parameter
    KroneckerFactors   A = mean over tokens of x x^T,  S = (1/N) sum_n sum_t g g^T            n x n and m x m
                       and (1/N) sum_n |g_t|^2 of every position t                            as many as positions
    GradientGram       (1/N) sum_n sum_t |g_t|^2 x_t x_t^T                                     n x n
    ProjectedFisher    (1/N) sum_n z_n z_n^T,  z_n = S^T vec(G_n) = sum_t (U^T left) o (V^T right)      p x p

With A a mean and S a sum over tokens, A (x) S has the scale of E[vec(G) vec(G)^T] where tokens are uncorrelated. An
accumulator holds sums only, so that those of several processes can be added; `finish` divides by N once at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hf_epimer.curvature.per_sample import Direct, Gradient, Outer
from hf_epimer.curvature.request import Kind
from hf_epimer.methods.statistic import FISHER_FILE, GRADIENT_GRAM_FILE, KRONECKER_FILE, StatisticsFile
from hf_epimer.numerics.subspace import TaggedBasis


class Accumulator(Protocol):
    """One statistic in the making."""

    @property
    def sums(self) -> dict[str, Tensor]:
        """By tensor name; added up over processes."""

    def add(self, name: str, gradient: Gradient) -> None:
        """Take the gradients of one parameter for the samples of one batch."""

    def finish(self, sums: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
        """The statistic, from the sums over all processes and the number N of samples in them.

        It may be made in the sums' own memory: of a large model there is not room for both.
        """


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value


STRIPS = 8
"""Into so many strips of rows a symmetric product is cut; what lies left of a strip is known from those above."""


def _add_symmetric(sums: dict[str, Tensor], name: str, left: Tensor, right: Tensor) -> None:
    """Add left^T right, n x n and known to be symmetric, on and above the diagonal: little more than half the work.

    Args:
        left, right: rows x n.
    """
    side = left.shape[1]
    if name not in sums:
        sums[name] = left.new_zeros(side, side)
    height = -(-side // STRIPS)
    for start in range(0, side, height):
        strip = slice(start, start + height)
        sums[name][strip, start:].addmm_(left[:, strip].mT, right[:, start:])


def _mean_(total: Tensor, samples: int) -> Tensor:
    """A sum divided by N, in place; of a symmetric matrix there is only what stands on and above the diagonal."""
    if total.ndim == 2:
        side = len(total)
        height = -(-side // STRIPS)
        for start in range(0, side, height):
            strip, below = slice(start, start + height), slice(start + height, side)
            block = total[strip, strip]
            block.copy_(block.triu() + block.triu(1).mT)
            total[below, strip] = total[strip, below].mT
    return total.div_(samples)


class FisherDiagonal:
    """Mean of squared per-sample gradients, one tensor per parameter (eq 9)."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = shapes
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Gradient) -> None:
        if isinstance(gradient, Direct):
            _add(self.sums, name, gradient.values.square().sum(0))
            return
        for one in gradient.per_sample():  # one at a time: it stays in the cache, and needs no memory to speak of
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(one)
            self.sums[name].addcmul_(one, one)

    def finish(self, sums: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
        return {name: total.div_(samples).view(self.shapes[name]) for name, total in sums.items()}


class SquaredMean:
    """Square of the mean gradient: cheap, and close to nothing at a minimum."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = shapes
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Gradient) -> None:
        if isinstance(gradient, Outer):
            _add(self.sums, name, gradient.left.flatten(0, 1).mT @ gradient.right.flatten(0, 1))
        else:
            _add(self.sums, name, gradient.values.sum(0))

    def finish(self, sums: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
        return {name: (total / samples).square().view(self.shapes[name]) for name, total in sums.items()}


class KroneckerFactors:
    """A, S and |g_t|^2 of every matrix, named as in a file; A is RegMean's Gram matrix."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.matrices = {name for name, shape in shapes.items() if len(shape) == 2}
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Gradient) -> None:
        if name not in self.matrices or not isinstance(gradient, Outer):
            return
        x, g = gradient.right.flatten(0, 1), gradient.heard().left.flatten(0, 1)
        _add(self.sums, f"{name}.positions", gradient.left.square().sum((0, 2)))
        _add_symmetric(self.sums, f"{name}.input_factor", x / gradient.right.shape[1], x)
        _add_symmetric(self.sums, f"{name}.output_factor", g, g)

    def finish(self, sums: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
        return {name: _mean_(total, samples) for name, total in sums.items()}


class GradientGram:
    """A^g of every matrix, n x n: its inputs, each position weighted by the squared norm of the gradient there; and
    the mean of these weights at every position.

        A^g = (1/N) sum_n sum_t |g_t|^2 x_t x_t^T

    It is the right factor of sum_n G_n^T G_n without the products of different positions. `across_positions` keeps
    those: (1/N) sum_n G_n^T G_n = (1/N) sum_n sum_{s,t} (g_s . g_t) x_s x_t^T, the first step of the power method from
    S = I towards the Kronecker product nearest to the Fisher information (Van Loan and Pitsianis, 1993).
    """

    def __init__(self, shapes: Mapping[str, torch.Size], *, across_positions: bool = False) -> None:
        self.matrices = {name for name, shape in shapes.items() if len(shape) == 2}
        self.across_positions = across_positions
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Gradient) -> None:
        if name not in self.matrices or not isinstance(gradient, Outer):
            return
        heard = gradient.heard()
        _add(self.sums, f"{name}.positions", gradient.left.square().sum((0, 2)))
        g, x = heard.left, heard.right
        weighted = (g @ g.mT) @ x if self.across_positions else x * g.square().sum(2, keepdim=True)
        _add_symmetric(self.sums, f"{name}.gradient_gram", x.flatten(0, 1), weighted.flatten(0, 1))

    def finish(self, sums: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
        return {name: _mean_(total, samples) for name, total in sums.items()}


ACCUMULATORS: dict[tuple[StatisticsFile, Kind], Callable[[Mapping[str, torch.Size]], Accumulator]] = {
    (FISHER_FILE, "per-sample"): FisherDiagonal,
    (FISHER_FILE, "squared-mean"): SquaredMean,
    (KRONECKER_FILE, "per-sample"): KroneckerFactors,
    (GRADIENT_GRAM_FILE, "per-sample"): GradientGram,
}
"""File, and which gradients -> what sums it up, made from the shapes of all parameters."""


class Together:
    """Several statistics from the gradients of one pass; every name stands behind the number of its accumulator."""

    def __init__(self, members: Sequence[Accumulator]) -> None:
        self.members = members

    @property
    def sums(self) -> dict[str, Tensor]:
        """Those of all members."""
        return _numbered([member.sums for member in self.members])

    def add(self, name: str, gradient: Gradient) -> None:
        for member in self.members:
            member.add(name, gradient)

    def finish(self, sums: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
        parts = split(sums, len(self.members))
        return _numbered([member.finish(part, samples) for member, part in zip(self.members, parts, strict=True)])


def split(tensors: Mapping[str, Tensor], members: int) -> list[dict[str, Tensor]]:
    """What `Together` gives, one mapping per accumulator with the names that it gave."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(members)]
    for numbered, tensor in tensors.items():
        number, name = numbered.split(" ", 1)
        parts[int(number)][name] = tensor
    return parts


def _numbered(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{number} {name}": tensor for number, part in enumerate(parts) for name, tensor in part.items()}


class ProjectedFisher:
    """The Fisher information on the tagged basis of every layer that has one; no m x n gradient is ever formed.

    H of N samples has rank N at most. The share of (tr H / p) I that Ledoit and Wolf's estimate would mix in is given
    beside it: with f = sum_n |z_n|^4,

        share = min(1, (f / N - |H|^2) / N / |H - (tr H / p) I|^2)               (Ledoit and Wolf, 2004, known mean)
    """

    def __init__(self, bases: Mapping[str, TaggedBasis], device: torch.device | str = "cpu") -> None:
        self.factors = {name: (basis.u.to(device), basis.v.to(device)) for name, basis in bases.items()}
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Gradient) -> None:
        if name not in self.factors or not isinstance(gradient, Outer):
            return
        u, v = self.factors[name]
        z = ((gradient.left @ u) * (gradient.right @ v)).sum(1)
        _add(self.sums, name, z.mT @ z)
        _add(self.sums, f"{name}.shrinkage", z.square().sum(1).square().sum().reshape(1))

    def finish(self, sums: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
        found = {}
        for name in self.factors.keys() & sums.keys():
            metric = sums[name].cpu().double() / samples
            found[name] = metric.to(sums[name].dtype)
            fourth = float(sums[f"{name}.shrinkage"])
            found[f"{name}.shrinkage"] = torch.tensor([_ledoit_wolf(metric, fourth, samples)], dtype=sums[name].dtype)
        return found


def _ledoit_wolf(metric: Tensor, fourth: float, samples: int) -> float:
    spread = float((metric - metric.diagonal().mean() * torch.eye(len(metric), dtype=metric.dtype)).square().sum())
    noise = (fourth / samples - float(metric.square().sum())) / samples
    return min(1.0, max(0.0, noise / spread)) if spread > 0 else 1.0
