"""What one merge reads (`Ingredients`), and the checks that need no weight: shapes fit, weights sum to 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real

from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.errors import MismatchError, UsageError
from hf_epimer.numerics.subspace import TaggedBasis
from hf_epimer.types import Shape


@dataclass(frozen=True)
class Ingredients:
    """Everything one merge reads.

    Attributes:
        base: theta_0.
        models: theta_t, in any order, with unique labels.
        weights: l_t >= 0; normalised to sum to 1 on use.
        statistics: per task, or None; a parameter missing there has no statistics. Tensors are named as the table in
            `hf_epimer.methods.statistic` says.
        bases: parameter -> the tagged basis in which statistics were taken; empty to compute bases as they are needed.
        curvature: per task, that of every linear layer's outputs, for a calibration; empty without one.
    """

    base: TensorSource
    models: Sequence[TensorSource]
    weights: Sequence[float]
    statistics: Sequence[TensorSource] | None = None
    bases: Mapping[str, TaggedBasis] = field(default_factory=dict)
    curvature: Sequence[TensorSource] = ()

    def sources(self) -> list[TensorSource]:
        """All of them."""
        return [self.base, *self.models, *(self.statistics or ())]


def normalized_weights(weights: Sequence[float] | None, tasks: int) -> list[float]:
    """l_t >= 0 with sum 1; equal weights for None.

    Raises:
        UsageError: wrong number, negative, not finite, or without a positive sum.
    """
    if weights is None:
        return [1 / tasks] * tasks
    if len(weights) != tasks:
        raise UsageError(f"--weights needs one number per model: {tasks} models, {len(weights)} weights")
    if not all(isinstance(w, Real) and math.isfinite(w) for w in weights):
        raise UsageError("--weights must be finite numbers")
    if any(w < 0 for w in weights):
        raise UsageError(f"--weights must not be negative: {min(weights)}")
    total = sum(weights)
    if math.isinf(total):
        raise UsageError("--weights are too large to be added up")
    if total <= 0:
        raise UsageError("--weights must sum to something positive")
    return [w / total for w in weights]


def check_shapes(reference: Mapping[str, Shape], source: TensorSource, what: str) -> None:
    """Compare names and shapes with the base's, before any weight is read.

    Args:
        reference: name -> shape, with -1 for a length that does not matter.
        source: what is compared with it.
        what: it is called in messages.

    Raises:
        MismatchError: naming what is missing, extra or shaped differently.
    """
    missing = [name for name in reference if name not in source.shapes]
    extra = [name for name in source.shapes if name not in reference]
    unlike = [name for name, shape in reference.items() if not _fits(source.shapes.get(name, shape), shape)]
    problems = []
    if missing:
        problems.append(f"missing {_some(missing)}")
    if extra:
        problems.append(f"unexpected {_some(extra)}")
    if unlike:
        name = unlike[0]
        others = f" (and {len(unlike) - 1} more)" if len(unlike) > 1 else ""
        problems.append(f"{name} has shape {list(source.shapes[name])} instead of {list(reference[name])}{others}")
    if prefix := _foreign_prefix(missing, extra):
        problems.append(f"its names have the prefix {prefix!r}, which is none that is known: store them without it")
    if problems:
        raise MismatchError(f"{source.label}: {what} does not fit the base: {'; '.join(problems)}")


def _foreign_prefix(missing: Sequence[str], extra: Sequence[str]) -> str | None:
    """What stands before the missing names, with their own first component or without, in all of the extra ones."""
    for name in (missing[0], missing[0].partition(".")[2]) if missing and extra else ():
        found = next((other for other in extra if name and other.endswith(f".{name}")), None)
        if found and all(other.startswith(found.removesuffix(name)) for other in extra):
            return found.removesuffix(name)
    return None


def _fits(shape: Shape, reference: Shape) -> bool:
    return len(shape) == len(reference) and all(expected in (length, -1) for expected, length in zip(reference, shape))


def _some(names: list[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
