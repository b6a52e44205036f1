"""The streaming loop: one layer of all models in memory at a time.

For every parameter of the base: subtract it from the fine-tuned weights into one reused buffer, hand the layer to the
method, add the merged task vector to the base, check that it is finite, pass it on. While a layer is solved, a thread
brings the next one's pages from the disk. Memory is that of the largest layer, whatever the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_epimer.checkpoints import Checkpoint, Shape, StateDict, TensorSource
from hf_epimer.errors import CheckpointError, MismatchError, StatisticsError, UsageError
from hf_epimer.methods import METHODS, Layer, Method
from hf_epimer.methods.base import Statistic


@dataclass(frozen=True)
class Ingredients:
    """Everything one merge reads.

    Attributes:
        base: theta_0.
        models: theta_t, in any order, with unique labels.
        weights: l_t >= 0; normalised to sum to 1 on use.
        statistics: per task, or None; a parameter missing there has no statistics.
    """

    base: TensorSource
    models: Sequence[TensorSource]
    weights: Sequence[float]
    statistics: Sequence[TensorSource] | None = None

    def sources(self) -> list[TensorSource]:
        """All of them."""
        return [self.base, *self.models, *(self.statistics or ())]


@dataclass(frozen=True)
class MergedLayer:
    """One merged parameter (in the dtype of the computation) and its line in the report."""

    name: str
    tensor: Tensor
    report: dict[str, Any]


def normalized_weights(weights: Sequence[float] | None, tasks: int) -> list[float]:
    """l_t >= 0 with sum 1; equal weights for None.

    Raises:
        UsageError: wrong number, negative, not finite, or without a positive sum.
    """
    if weights is None:
        return [1 / tasks] * tasks
    if len(weights) != tasks:
        raise UsageError(f"--weights needs one number per model: {tasks} models, {len(weights)} weights")
    if not all(math.isfinite(w) for w in weights):
        raise UsageError("--weights must be finite numbers")
    if any(w < 0 for w in weights):
        raise UsageError(f"--weights must not be negative: {min(weights)}")
    total = math.fsum(weights)
    if total <= 0:
        raise UsageError("--weights must sum to something positive")
    return [w / total for w in weights]


def check_shapes(reference: Mapping[str, Shape], source: TensorSource, what: str) -> None:
    """Compare names and shapes with the base's, before any weight is read.

    Raises:
        MismatchError: naming what is missing, extra or shaped differently.
    """
    missing = [name for name in reference if name not in source.shapes]
    extra = [name for name in source.shapes if name not in reference]
    unlike = [name for name, shape in reference.items() if source.shapes.get(name, shape) != shape]
    problems = []
    if missing:
        problems.append(f"missing {_some(missing)}")
    if extra:
        problems.append(f"unexpected {_some(extra)}")
    if unlike:
        name = unlike[0]
        others = f" (and {len(unlike) - 1} more)" if len(unlike) > 1 else ""
        problems.append(f"{name} has shape {list(source.shapes[name])} instead of {list(reference[name])}{others}")
    if problems:
        raise MismatchError(f"{source.label}: {what} does not fit the base: {'; '.join(problems)}")


def _some(names: list[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def merge_layers(
    ingredients: Ingredients,
    method: Method,
    config: Any,
    *,
    seed: int = 0,
    exact: bool = False,
    device: str = "cpu",
    on_layer: Callable[[str, int], None] = lambda stage, layers: None,
) -> Iterator[MergedLayer]:
    """Merge parameter by parameter, in the order of the base.

    Args:
        ingredients: checked to fit together.
        method: from METHODS.
        config: an instance of `method.config`.
        seed: of everything random.
        exact: float64, full decompositions, dense solves.
        device: where layers are solved; files are always read to the CPU.
        on_layer: called with the stage ("survey" or "merge") and 1 after every layer.

    Raises:
        CheckpointError, StatisticsError: NaN or Inf in an input (tensor named), negative statistics.
        ArithmeticError: the merged tensor is not finite.
    """

    def read(stage: str) -> Iterator[Layer]:
        for layer in _read_layers(ingredients, method, seed=seed, exact=exact, device=device):
            yield layer
            on_layer(stage, 1)

    survey = method.survey(config, lambda: read("survey")) if method.survey else None
    for layer in read("merge"):
        merged = method.merge(layer, config, survey)
        norm = float(torch.linalg.vector_norm(merged.task_vector))
        if not math.isfinite(norm) and not bool(merged.task_vector.isfinite().all()):
            raise ArithmeticError(f"{layer.name}: {method.name} gave NaN or Inf; try a larger --damping or --exact")
        report = {
            "name": layer.name,
            "shape": list(layer.base.shape),
            **merged.report,
            "merged_norm": norm,
            "task_vector_norms": _norms(layer.task_vectors).tolist(),
        }
        yield MergedLayer(layer.name, (layer.base + merged.task_vector).cpu(), report)


def _read_layers(
    ingredients: Ingredients, method: Method, *, seed: int, exact: bool, device: str
) -> Iterator[Layer]:
    """Layers one after the other; each is valid until the next one is asked for, since buffers are reused."""
    dtype = torch.float64 if exact else torch.float32
    models = ingredients.models
    names = list(ingredients.base.shapes)
    largest = max(math.prod(shape) for shape in ingredients.base.shapes.values())
    differences = torch.empty(len(models), largest, dtype=dtype)
    statistics = _StatisticsBuffer(ingredients.statistics or (), method.needs, dtype) if method.needs else None
    labels = tuple(model.label for model in models)
    weights = torch.tensor(normalized_weights(ingredients.weights, len(models)), dtype=dtype, device=device)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as thread:
        for index, name in enumerate(names):
            if index + 1 < len(names):
                thread.submit(_read_ahead, ingredients.sources(), names[index + 1])
            base = ingredients.base.tensor(name).to(dtype)
            _check_finite(ingredients.base, name, base)
            task_vectors = differences[:, : base.numel()].view(-1, *base.shape)
            for model, difference in zip(models, task_vectors, strict=True):
                stored = model.tensor(name)
                torch.sub(stored if stored.dtype.itemsize <= dtype.itemsize else stored.to(dtype), base, out=difference)
                _check_finite(model, name, difference)
            yield Layer(
                name=name,
                base=base.to(device),
                task_vectors=task_vectors.to(device),
                weights=weights,
                is_matrix=base.ndim == 2,
                labels=labels,
                statistics=statistics.read(name, device) if statistics else None,
                seed=seed,
                exact=exact,
            )


def _read_ahead(sources: Sequence[TensorSource], name: str) -> None:
    for source in sources:
        if isinstance(source, Checkpoint) and name in source.shapes:
            source.read_ahead(name)


class _StatisticsBuffer:
    """T statistics of one parameter in one reused buffer."""

    def __init__(self, sources: Sequence[TensorSource], kind: Statistic, dtype: torch.dtype) -> None:
        self.sources = sources
        self.kind = kind
        largest = max((math.prod(shape) for source in sources for shape in source.shapes.values()), default=0)
        self.buffer = torch.empty(len(sources), largest, dtype=dtype)

    def read(self, name: str, device: str) -> Tensor | None:
        present = [name in source.shapes for source in self.sources]
        if not any(present):
            return None
        if not all(present):
            raise StatisticsError(f"{self.sources[present.index(False)].label}: no statistics for {name}")
        shape = self.sources[0].shapes[name]
        values = self.buffer[:, : math.prod(shape)].view(-1, *shape)
        for source, value in zip(self.sources, values, strict=True):
            value.copy_(source.tensor(name))
            lowest, highest = torch.aminmax(value)
            if not (math.isfinite(float(lowest)) and math.isfinite(float(highest))):
                raise StatisticsError(f"{source.label}: NaN or Inf in {name}")
            if float(lowest if self.kind == "fisher" else value.diagonal().min()) < 0:
                raise StatisticsError(f"{source.label}: negative values in {name}")
        return values.to(device)


def _check_finite(source: TensorSource, name: str, values: Tensor) -> None:
    # a sum is finite unless an entry is not, or it overflows: one fast pass decides nearly always
    if not math.isfinite(float(values.sum())) and not bool(values.isfinite().all()):
        raise CheckpointError(f"{source.label}: NaN or Inf in {name}; this checkpoint is damaged or diverged")


def _norms(task_vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(task_vectors.flatten(1), dim=1)


def merge_state_dicts(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    method: str = "epimer",
    config: Any = None,
    statistics: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    weights: Sequence[float] | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    exact: bool = False,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Merge models in memory, of any architecture: two-dimensional parameters are matrices, the rest is not.

    Args:
        base: name -> W_0.
        tuned: one mapping per task with the names and shapes of `base`, any floating dtype.
        method: a name from METHODS.
        config: an instance of that method's config dataclass; its defaults for None.
        statistics: one mapping per task: Fisher diagonals (shaped like the parameters) for `epimer`, `fisher` and
            `gradient-matching`, Gram matrices (n x n) for `regmean`.
        weights: l_t, normalised to sum to 1.
        labels: unique task names; only random masks depend on them.
        seed, exact, device: as in `merge_layers`.

    Returns:
        name -> merged tensor, in the dtype of the base.

    Raises:
        UsageError: unknown method, wrong config, unusable weights.
        MismatchError: unlike names or shapes.
        StatisticsError: statistics missing or unusable.
    """
    chosen = find_method(method)
    config = chosen.config() if config is None else config
    if not isinstance(config, chosen.config):
        raise UsageError(f"{method} takes a {chosen.config.__name__}, not a {type(config).__name__}")
    if not tuned:
        raise UsageError("there is nothing to merge: give at least one fine-tuned model")
    names = list(labels) if labels is not None else [f"model {index}" for index in range(len(tuned))]
    source = StateDict("base", {name: tensor for name, tensor in base.items() if tensor.is_floating_point()})
    models = [StateDict(label, tensors) for label, tensors in zip(names, tuned, strict=True)]
    for model in models:
        check_shapes(StateDict("base", base).shapes, model, "the checkpoint")
    measured = None
    if chosen.needs:
        if statistics is None:
            raise StatisticsError(f"{method} needs {chosen.needs} statistics, one mapping per model")
        if len(statistics) != len(models):
            raise StatisticsError(f"{len(models)} models but {len(statistics)} sets of statistics")
        measured = [StateDict(label, tensors) for label, tensors in zip(names, statistics, strict=True)]
        if chosen.needs == "fisher":
            for entry in measured:
                check_shapes(source.shapes, entry, "its Fisher information")
    ingredients = Ingredients(source, models, normalized_weights(weights, len(models)), measured)
    merged = {
        layer.name: layer.tensor.to(base[layer.name].dtype)
        for layer in merge_layers(ingredients, chosen, config, seed=seed, exact=exact, device=device)
    }
    return {name: merged.get(name, tensor) for name, tensor in base.items()}  # counters and the like stay the base's


def find_method(name: str) -> Method:
    """The method of this name.

    Raises:
        UsageError: listing the names there are.
    """
    if name not in METHODS:
        raise UsageError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
