"""Fisher information out of a training run: a callback for `transformers.Trainer`, and Adam's second moments.

FisherCallback     measures the trained model on (a part of) its training data and writes fisher.safetensors and
                   gradient_gram.safetensors beside the checkpoint
fisher_from_adam   v_hat = exp_avg_sq / (1 - beta_2^step) of an Adam-type optimiser: the squared gradients of batches,
                   averaged over the last 1 / (1 - beta_2) steps. Free, and no per-sample quantity: for batches of B
                   independent samples near a minimum it is about F / B, which `batch_size` undoes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback

from hf_epimer.curvature.accumulators import ACCUMULATORS, Together, split
from hf_epimer.curvature.data_pass import Subject, accumulate, probe_determinism
from hf_epimer.curvature.files import StatisticsMetadata, save_statistics
from hf_epimer.curvature.request import Labels
from hf_epimer.errors import DataError, StatisticsError
from hf_epimer.methods.statistic import PUBLISHED_FILES
from hf_epimer.models import ARCHITECTURES
from hf_epimer.models.weights import parameter_names
from hf_epimer.tasks.images import Batch

logger = logging.getLogger(__name__)


class FisherCallback(TrainerCallback):
    """Writes what others need to merge the model into the trainer's output folder at the end of training:
    `fisher.safetensors` and `gradient_gram.safetensors`.

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[FisherCallback(task="dtd")])

    The model must contain a vision tower of a known family and return `logits` for batches that hold `labels`. The
    first batch is passed twice before training starts, so that a data set with random augmentation, which would make
    the measurement meaningless, is refused then and not after hours of training; give another one as `dataset`.

    Args:
        task: its name, for the file's header.
        samples: of the data set, chosen by `seed`.
        dataset: to measure on; None for the training set.
        labels: `true`, or `sampled` from the model's own predictions.
        probe: look for randomness before training.
    """

    def __init__(
        self,
        task: str = "",
        samples: int = 256,
        *,
        dataset: Any = None,
        labels: Labels = "true",
        seed: int = 0,
        probe: bool = True,
    ) -> None:
        self.task = task
        self.samples = samples
        self.dataset = dataset
        self.labels: Labels = labels
        self.seed = seed
        self.probe = probe

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Refuse what could not be measured in the end."""
        with _evaluating(given["model"]) as model:
            subject = _tower_subject(model)
            if self.probe:
                probe_determinism(subject, self._batches(args, given["train_dataloader"]), Accelerator())

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure and write."""
        accelerator = Accelerator()
        with _evaluating(given["model"]) as model:
            subject = _tower_subject(model)
            makers = [ACCUMULATORS[file, "per-sample"] for file in PUBLISHED_FILES]
            tensors, count = accumulate(
                subject,
                self._batches(args, given["train_dataloader"]),
                Together([make(subject.shapes) for make in makers]),
                labels=self.labels,
                seed=self.seed,
                accelerator=accelerator,
            )
        if accelerator.is_main_process:
            name = getattr(args, "hub_model_id", None) or Path(args.output_dir).name
            origin = StatisticsMetadata(count, self.task, "", "", name, "", self.labels, self.seed)
            for file, part in zip(PUBLISHED_FILES, split(tensors, len(PUBLISHED_FILES)), strict=True):
                path = Path(args.output_dir) / file.name
                save_statistics(path, part, origin, file, file.published_as)
                logger.info("%s from %d samples: %s", file.title, count, path)

    def _batches(self, args: Any, loader: Any) -> _LoaderBatches:
        dataset = self.dataset if self.dataset is not None else loader.dataset
        if not hasattr(dataset, "__len__"):
            raise DataError("FisherCallback cannot choose samples from a stream: give a data set with a length")
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.seed))
        chosen = order[: self.samples].tolist()
        return _LoaderBatches(dataset, chosen, args.per_device_train_batch_size, loader.collate_fn)


def fisher_from_adam(optimizer: Any, model: nn.Module, batch_size: int = 1) -> dict[str, Tensor]:
    """An estimate of the Fisher diagonal from the second moments that an Adam-type optimiser holds.

    Args:
        optimizer: torch.optim.Adam, AdamW or one with the same state, after at least one step.
        model: whose parameters it trains; of a vision tower within, the names on disk are used.
        batch_size: of the training steps (over all processes and accumulation steps).

    Returns:
        Name -> fp32 tensor on the CPU, for `save_statistics`.

    Raises:
        StatisticsError: it holds no second moments for a parameter of the tower.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    betas = {parameter: group["betas"][1] for group in optimizer.param_groups for parameter in group["params"]}
    subject = _tower_subject(model)
    moments = {}
    for place, name in subject.names.items():
        parameter = model.get_parameter(place)
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            raise StatisticsError(
                f"{name}: the optimiser holds no second moment of it (is it frozen, or not yet stepped?)"
            )
        bias = 1 - betas[parameter] ** float(state["step"])
        moments[name] = (batch_size * state["exp_avg_sq"].detach().float() / bias).cpu()
    return moments


@dataclass(frozen=True)
class _LoaderBatches:
    """Samples of a training set as batches, this process's share; readable again."""

    dataset: Any
    chosen: list[int]
    size: int
    collate: Callable[[Any], Any]

    def __iter__(self) -> Iterator[Batch]:
        accelerator = Accelerator()
        mine = list(range(accelerator.process_index, len(self.chosen), accelerator.num_processes))
        subset = Subset(self.dataset, [self.chosen[index] for index in mine])
        loader = DataLoader(subset, self.size, collate_fn=self.collate)
        for start, values in zip(range(0, len(mine), self.size), loader, strict=True):
            labels = values.pop("labels", None)
            if labels is None:
                raise DataError("FisherCallback needs batches with `labels`")
            yield Batch(values, labels, mine[start : start + len(labels)])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model without its wrappers, in evaluation mode, and as it was afterwards."""
    model = getattr(model, "module", model)
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


def _tower_subject(model: nn.Module) -> Subject:
    """The vision tower within a model, the first that is found.

    Raises:
        StatisticsError: there is none.
    """
    for path, module in model.named_modules():
        classes = {kind.__name__ for kind in type(module).__mro__}
        for architecture in ARCHITECTURES:
            if classes.intersection(architecture.tower_classes):
                names = parameter_names(module, architecture)
                inside = f"{path}." if path else ""
                found = {inside + name: canonical for name, canonical in names.items()}
                kind = architecture.classification
                trained = kind is not None and type(model).__name__ == kind.trained_class
                return Subject(model, found, _logits, architecture.unread_among(names.values(), by_classifier=trained))
    known = " or ".join(architecture.output_class for architecture in ARCHITECTURES)
    raise StatisticsError(f"{type(model).__name__} contains no {known} to measure")


def _logits(forward: Callable[..., Any], inputs: Any) -> Tensor:
    output = forward(**inputs)
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise StatisticsError("the model returns no `logits` to take the Fisher information of")
    return logits
