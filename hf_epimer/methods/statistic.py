"""The curvature statistics: what a method wants to know of every task beside its weights. One visible table.

For a weight W, m x n, that acts as y = W x at every position of a sequence, g the gradient of the loss at y, G the
gradient of the loss at W of one sample, S the tagged basis of p atoms, and E the mean over samples:

    fisher          v = E[G o G], shaped like W, for every parameter
    gram            A = E[mean over positions of x x^T], n x n
    kronecker       A and S = E[sum over positions of g g^T], m x m
    gradient-gram   A^g = E[sum over positions of |g|^2 x x^T], n x n: the inputs, as far as the loss hears of them
    positions       E[|g|^2] of every position: how much the loss hears of it
    projected       H = E[z z^T] with z = S^T vec(G), p x p, and the share of (tr H / p) I that Ledoit and Wolf's
                    estimate mixes into it, in [0, 1]

Adding a statistic: its row here, and what sums it up in `hf_epimer.curvature.accumulators`. Files, caches, checks,
messages and cards follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from hf_epimer.types import Shape


@dataclass(frozen=True)
class Part:
    """One tensor of a statistic.

    Attributes:
        name: as methods ask for it (`Layer.measured`).
        suffix: what a file of such statistics adds to the parameter's name.
        shape: of the parameter -> of the tensor, with -1 for a length that the parameter does not tell; None where
            such a parameter has none.
        is_symmetric: whether it is a symmetric positive semidefinite matrix; otherwise no entry is negative.
        is_optional: whether some tasks may lack it while others have it; theirs are zeros then.
    """

    name: str
    suffix: str
    shape: Callable[[Shape], Shape | None]
    is_symmetric: bool = False
    is_optional: bool = False


@dataclass(frozen=True)
class StatisticsFile:
    """Statistics that are measured in one pass and lie in one file.

    Attributes:
        key: in the cache.
        name: beside a checkpoint's weights.
        format: in its header, with a version.
        title: of what it holds, as messages and cards call it.
        description: for the card of the checkpoint; goes on from "holds".
        is_halved: whether symmetric matrices are stored by their upper triangles.
        published_as: the type in which it is written beside weights; in the cache it is fp32.
    """

    key: str
    name: str
    format: str
    title: str
    description: str
    is_halved: bool = False
    published_as: Literal["bf16"] | None = None


@dataclass(frozen=True)
class StatisticKind:
    """One row of the table.

    Attributes:
        name: for lists and JSON.
        title: as messages call it.
        parts: the tensors of every parameter.
        file: where they are found; None for what is measured anew for every merge, since it holds for no other.
    """

    name: str
    title: str
    parts: tuple[Part, ...]
    file: StatisticsFile | None

    def __str__(self) -> str:
        return self.name

    def shapes(self, parameters: Mapping[str, Shape]) -> dict[str, Shape]:
        """Name in a file -> shape, for a model of these parameters; -1 for lengths that they do not tell."""
        stored = {name + part.suffix: part.shape(shape) for name, shape in parameters.items() for part in self.parts}
        return {name: shape for name, shape in stored.items() if shape is not None}


def _of_parameter(shape: Shape) -> Shape:
    return shape


def _of_inputs(shape: Shape) -> Shape | None:
    return (shape[1], shape[1]) if len(shape) == 2 else None


def _of_outputs(shape: Shape) -> Shape | None:
    return (shape[0], shape[0]) if len(shape) == 2 else None


def _of_positions(shape: Shape) -> Shape | None:
    return (-1,) if len(shape) == 2 else None


def _of_atoms(shape: Shape) -> Shape | None:
    return (-1, -1) if len(shape) == 2 else None


def _of_share(shape: Shape) -> Shape | None:
    return (1,) if len(shape) == 2 else None


_INPUT = Part("input", ".input_factor", _of_inputs, is_symmetric=True)
_OUTPUT = Part("output", ".output_factor", _of_outputs, is_symmetric=True)
_GRADIENT_GRAM = Part("gradient", ".gradient_gram", _of_inputs, is_symmetric=True, is_optional=True)
_POSITIONS = Part("positions", ".positions", _of_positions)

FISHER_FILE = StatisticsFile(
    "fisher",
    "fisher.safetensors",
    "hf-epimer.fisher/1",
    "Fisher information",
    "the diagonal of this model's Fisher information (the mean square of every entry of the per-sample gradients)",
)
KRONECKER_FILE = StatisticsFile(
    "kronecker",
    "kronecker.safetensors",
    "hf-epimer.kronecker/1",
    "Kronecker factors",
    "Kronecker factors of this model's curvature: the second moments of every layer's inputs and output gradients",
)
GRADIENT_GRAM_FILE = StatisticsFile(
    "gradient-gram",
    "gradient_gram.safetensors",
    "hf-epimer.gradient-gram/1",
    "Gradient-weighted Gram matrices",
    "for every matrix of this model the second moments of its inputs, weighted at every position by how much the loss "
    "hears of it (the upper triangles of the mean over samples of the sum over positions of |g|^2 x x^T), and those "
    "weights",
    is_halved=True,
    published_as="bf16",
)

FISHER_DIAGONAL = StatisticKind("fisher", "Fisher information", (Part("fisher", "", _of_parameter),), FISHER_FILE)
GRAM = StatisticKind("gram", "Gram matrices", (_INPUT,), KRONECKER_FILE)
KRONECKER = StatisticKind("kronecker", "Kronecker factors", (_INPUT, _OUTPUT), KRONECKER_FILE)
GRADIENT_GRAM = StatisticKind("gradient-gram", "gradient-weighted Gram matrices", (_GRADIENT_GRAM,), GRADIENT_GRAM_FILE)
POSITIONS = StatisticKind("positions", "share of every position in the loss", (_POSITIONS,), GRADIENT_GRAM_FILE)
PROJECTED_FISHER = StatisticKind(
    "projected",
    "projected Fisher information",
    (Part("projected", "", _of_atoms, is_symmetric=True), Part("shrinkage", ".shrinkage", _of_share)),
    None,
)

STATISTICS: dict[str, StatisticKind] = {
    kind.name: kind for kind in (FISHER_DIAGONAL, GRAM, KRONECKER, GRADIENT_GRAM, POSITIONS, PROJECTED_FISHER)
}
STATISTICS_FILES: tuple[StatisticsFile, ...] = (FISHER_FILE, KRONECKER_FILE, GRADIENT_GRAM_FILE)
PUBLISHED_FILES = (FISHER_FILE, GRADIENT_GRAM_FILE)
"""What lies beside published weights, so that others can merge them without data."""

_STORED = [part for kind in STATISTICS.values() for part in kind.parts if part.suffix]
_SUFFIXES = {part.suffix for part in _STORED}
SYMMETRIC_SUFFIXES = tuple({part.suffix for part in _STORED if part.is_symmetric})


def split_name(stored: str) -> tuple[str, str]:
    """The name of a tensor in a file of statistics as the parameter's name and the part's suffix."""
    suffix = next((suffix for suffix in _SUFFIXES if stored.endswith(suffix)), "")
    return stored.removesuffix(suffix), suffix
