"""One pass over a task's samples: an ordinary forward and backward pass per batch, observed layer by layer.

Under `accelerate launch` every process holds the whole model and takes its share of the samples; sums are added up
once, at the end, so uneven shares are neither dropped nor counted twice. The result does not depend on the batch size
or the number of processes beyond float32's rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_epimer.curvature.accumulators import Accumulator, FisherDiagonal
from hf_epimer.curvature.per_sample import Gradient, no_gradient, per_sample_gradients
from hf_epimer.curvature.request import Labels
from hf_epimer.errors import DataError, StatisticsError, UsageError
from hf_epimer.merging.finite import is_finite
from hf_epimer.models.classifier import Classifier
from hf_epimer.models.transfer import sent
from hf_epimer.tasks.images import Batch
from hf_epimer.types import Precision


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        model: in evaluation mode.
        names: parameter in the model -> its name in the result.
        logits: (forward, inputs of a batch) -> logits [n, classes]; `forward` stands for the model's own call.
        unread: names in the result of parameters that the logits do not depend on, so that their gradients are zero.
    """

    model: nn.Module
    names: Mapping[str, str]
    logits: Callable[[Callable[..., Any], Any], Tensor] = lambda forward, inputs: forward(inputs)
    unread: frozenset[str] = frozenset()

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Name in the result -> shape."""
        return {name: self.model.get_parameter(own).shape for own, name in self.names.items()}

    @property
    def read(self) -> dict[str, str]:
        """Those of `names` that the logits depend on."""
        return {own: name for own, name in self.names.items() if name not in self.unread}


def subject_of(classifier: Classifier) -> Subject:
    """The vision tower of a classifier, under the names it has on disk."""
    return Subject(classifier, classifier.tower_names(), unread=classifier.unread())


def accumulate(
    subject: Subject,
    batches: Iterable[Batch],
    accumulator: Accumulator,
    *,
    labels: Labels = "true",
    seed: int = 0,
    precision: Precision = "no",
    accelerator: Accelerator | None = None,
    on_samples: Callable[[int], None] = lambda count: None,
) -> tuple[dict[str, Tensor], int]:
    """Accumulate one statistic of the loss sum_n -log p(y_n | x_n).

    Args:
        batches: this process's share.
        labels: those of the data (empirical Fisher), or drawn from the model's own predictions (the true Fisher).
        seed: of the drawn labels; sample i gets the same one in every batch size and on every number of processes.
        precision: of the forward and backward pass; fp16 would lose small gradients.
        accelerator: moves inputs to its device and adds up over processes.
        on_samples: called with the number of samples done since the last call.

    Returns:
        The statistic on the CPU, and the number of samples of all processes.

    Raises:
        StatisticsError: no samples, a parameter without a gradient, or a gradient that is not finite.
    """
    accelerator = accelerator or Accelerator()
    device = accelerator.device
    seen: set[str] = set()

    def consume(name: str, gradient: Gradient) -> None:
        seen.add(name)
        accumulator.add(name, gradient)

    subject.model.to(device)
    count = 0
    with per_sample_gradients(subject.model, subject.read, consume) as forward:
        for batch in batches:
            _loss(subject, forward, batch, device, labels, seed, precision).backward()
            count += len(batch.labels)
            on_samples(len(batch.labels))
    for name in subject.unread:
        accumulator.add(name, no_gradient(subject.shapes[name], device))
    unreached = sorted(set(subject.read.values()) - seen)
    if count and unreached:
        raise StatisticsError(f"the loss does not depend on {unreached[0]} ({len(unreached)} such parameters)")
    sums, samples = _over_processes(accumulator.sums, count, accelerator)
    if not samples:
        raise StatisticsError("there are no samples to take statistics from")
    found = {name: tensor.cpu() for name, tensor in accumulator.finish(sums, samples).items()}
    for name, tensor in found.items():
        if not is_finite(tensor):
            raise StatisticsError(
                f"the gradient of {name} is not finite; is the checkpoint damaged, or half precision on?"
            )
    return found, samples


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    labels: Labels = "true",
    seed: int = 0,
    probe: bool = True,
) -> dict[str, Tensor]:
    """The diagonal of a classifier's Fisher information (eq 9): mean squared per-sample gradients of its loss.

    Args:
        model: inputs to logits [n, classes]. Of a `Classifier` only the vision tower is measured, under the names it
            has on disk; of any other model every parameter, under its own name.
        batches: (inputs [n, ...], labels [n]) pairs; may be read again from the start.
        labels, seed: as in `accumulate`.
        probe: pass the first batch twice first, and refuse a model or data in which anything is random.

    Returns:
        Name -> tensor shaped like the parameter, never negative.

    Raises:
        StatisticsError: as in `accumulate` and `probe_determinism`.
        DataError: a label that no class of the model has.
    """
    if probe and iter(batches) is batches:
        raise UsageError("batches that can be read only once cannot be probed: give a list or a loader, or probe=False")
    numbered = _Numbered(batches)
    everything = {name: name for name, _ in model.named_parameters()}
    subject = subject_of(model) if isinstance(model, Classifier) else Subject(model, everything)
    was_training = model.training
    model.eval()
    try:
        if probe:
            probe_determinism(subject, numbered)
        return accumulate(subject, numbered, FisherDiagonal(subject.shapes), labels=labels, seed=seed)[0]
    finally:
        model.train(was_training)


def probe_determinism(
    subject: Subject, batches: Iterable[Batch], accelerator: Accelerator | None = None, tolerance: float = 1e-3
) -> None:
    """Read and pass the first batch twice; a statistic of something that changes in between means nothing.

    Args:
        tolerance: of the gradients, relative; processors differ in the last digits from run to run.

    Raises:
        StatisticsError: the data (augmentation), the loss (dropout) or a gradient differ, saying which.
    """
    accelerator = accelerator or Accelerator()
    first, second = (_fingerprint(subject, batches, accelerator) for _ in range(2))
    guesses = {"inputs": "the images (is an augmentation on?)", "loss": "the loss (is dropout on?)"}
    for name, value in first.items():
        if _differ(value, second[name], tolerance):
            where = guesses.get(name, f"the gradient of {name}")
            raise StatisticsError(
                f"two passes over the first batch do not agree in {where}: turn off what is random, or skip this check "
                "(--no-probe)"
            )


class _Fingerprint:
    """A few numbers per parameter that change when its gradients do."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Gradient) -> None:
        parts = vars(gradient).values()
        self.sums[name] = torch.stack([part.detach().norm() for part in parts]).cpu()

    def finish(self, sums: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
        return dict(sums)


def _fingerprint(subject: Subject, batches: Iterable[Batch], accelerator: Accelerator) -> dict[str, Tensor]:
    batch = next(iter(batches), None)
    if batch is None:
        return {}
    found = _Fingerprint()
    subject.model.to(accelerator.device)
    with per_sample_gradients(subject.model, subject.read, found.add) as forward:
        loss = _loss(subject, forward, batch, accelerator.device)
        loss.backward()
    tensors = batch.inputs.values() if isinstance(batch.inputs, Mapping) else [batch.inputs]
    seen = torch.stack([tensor.detach().float().norm() for tensor in tensors]).cpu()
    return {"inputs": seen, "loss": loss.detach().cpu().reshape(1)} | found.sums


def _differ(one: Tensor, two: Tensor, tolerance: float) -> bool:
    return one.shape != two.shape or not torch.allclose(one, two, rtol=tolerance, atol=0.0, equal_nan=True)


def _loss(
    subject: Subject,
    forward: Callable[..., Any],
    batch: Batch,
    device: torch.device,
    labels: Labels = "true",
    seed: int = 0,
    precision: Precision = "no",
) -> Tensor:
    """Summed, not averaged, over the batch: every sample's gradient is then its own."""
    with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = subject.logits(lambda *a, **k: forward(len(batch.labels), *a, **k), _moved(batch.inputs, device))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    outside = batch.labels[(batch.labels < 0) | (batch.labels >= logits.shape[1])]
    if len(outside):
        raise DataError(f"label {int(outside[0])} is outside the {logits.shape[1]} classes of the head")
    targets = batch.labels if labels == "true" else _drawn(logits.detach().cpu(), batch.indices, seed)
    return cross_entropy(logits, sent(targets, device), reduction="sum")


def _moved(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Mapping):
        return {name: sent(value, device) for name, value in inputs.items()}
    return sent(inputs, device)


def _drawn(logits: Tensor, indices: Sequence[int], seed: int) -> Tensor:
    """One label per sample from the model's own distribution, by a random number that belongs to the sample.

    Args:
        logits: on the CPU, for float64 and the same labels on every device.
    """
    numbers = [np.random.Generator(np.random.Philox(key=seed, counter=index)).random() for index in indices]
    cumulated = logits.double().softmax(-1).cumsum(-1)
    thresholds = torch.tensor(numbers, dtype=torch.float64).unsqueeze(1) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, thresholds, right=True).squeeze(1).clamp_max(logits.shape[1] - 1)


def _over_processes(
    sums: Mapping[str, Tensor], count: int, accelerator: Accelerator
) -> tuple[Mapping[str, Tensor], int]:
    """Added up over processes. One that had no samples contributes zeros, since all must take part."""
    if accelerator.num_processes == 1:
        return sums, count
    shapes: list[Any] = [{name: (tuple(value.shape), value.dtype) for name, value in sums.items()}]
    agreed: dict[str, Any] = {}
    for entry in gather_object(shapes):
        agreed |= entry
    zeros = {
        name: torch.zeros(shape, dtype=dtype, device=accelerator.device) for name, (shape, dtype) in agreed.items()
    }
    mine = {name: sums.get(name, zeros[name]) for name in sorted(agreed)}
    total = accelerator.reduce({"count": torch.tensor(count, device=accelerator.device), **mine}, "sum")
    return {name: value for name, value in total.items() if name != "count"}, int(total["count"])


@dataclass(frozen=True)
class _Numbered:
    """Batches with their samples counted from 0."""

    batches: Iterable[tuple[Tensor, Tensor]]

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for inputs, labels in self.batches:
            yield Batch(inputs, labels, range(start, start + len(labels)))
            start += len(labels)
