"""From a checkpoint and its task to a file of statistics, through a local cache.

A file is cached under everything that decides its numbers: the checkpoint's and the data set's commits, the split, the
samples, the seed, the labels and the head. It is there as soon as its task is done, so an interrupted merge of eight
tasks repeats only what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from huggingface_hub import constants
from torch import Tensor

from hf_epimer.data import ImageBatches, Samples, data_revision, read_samples
from hf_epimer.heads import classifier_for, load_tower
from hf_epimer.hub import Source
from hf_epimer.methods.base import Statistic
from hf_epimer.numerics.subspace import TaggedBasis
from hf_epimer.resolving import content_sha, model_folder
from hf_epimer.statistics.accumulators import (
    Accumulator,
    FisherDiagonal,
    KroneckerFactors,
    ProjectedFisher,
    SquaredMean,
)
from hf_epimer.statistics.files import FORMATS, StatisticsMetadata, save_statistics
from hf_epimer.statistics.sweep import Labels, Precision, Subject, probe_determinism, sweep
from hf_epimer.tasks import Task

OnSamples = Callable[[int], None]
Kind = Literal["per-sample", "squared-mean"]


@dataclass(frozen=True)
class Sampling:
    """Which samples, and what of them. Everything here decides the numbers.

    Attributes:
        samples: at most so many.
        fraction: of the split, instead; in (0, 1].
        split: of the data set; None for the task's training split.
        labels: `true`, or `sampled` from the model's own predictions.
        kind: the mean of per-sample squares, or the square of the mean.
        streaming: fetch only the samples that are used; None, in a recipe, to decide by the size of the data set.
        precision: of the forward and backward pass; sums are always in fp32.
    """

    samples: int | None = 256
    fraction: float | None = None
    split: str | None = None
    labels: Labels = "true"
    seed: int = 0
    kind: Kind = "per-sample"
    streaming: bool | None = False
    precision: Precision = "no"


@dataclass(frozen=True)
class Estimate:
    """Statistics of one checkpoint on one task that are still to be taken, or in the cache already."""

    model: Source
    base: Source
    task: Task
    sampling: Sampling

    @property
    def split(self) -> str:
        """The split whose samples are used."""
        return self.sampling.split or self.task.train_split

    @cached_property
    def revision(self) -> str:
        """The commit of the data set, or a digest of a local folder."""
        return data_revision(self.task)

    @cached_property
    def model_sha(self) -> str:
        """The commit of the checkpoint, or the sha256 of its local weights."""
        return content_sha(self.model)

    def cached(self, statistic: Statistic) -> Path:
        """Where the file is, or will be, in the cache."""
        identity = json.dumps([FORMATS[statistic], self._identity()], sort_keys=True)
        name = f"{self.task.name}-{statistic}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.safetensors"
        return Path(constants.HF_HOME) / "hf-epimer" / "statistics" / name

    def _identity(self) -> dict[str, Any]:
        task = self.task
        if task.head:
            head: Any = hashlib.sha256(Path(task.head).read_bytes()).hexdigest()
        else:
            head = [task.class_names, task.templates]
        return {
            "model": self.model_sha,
            "base": content_sha(self.base),
            "head": head,
            "data": [task.dataset, task.config, self.revision, self.split, task.image_column, task.label_column],
            "sampling": vars(self.sampling),
        }


def estimate_file(
    estimate: Estimate,
    statistic: Statistic,
    *,
    batch_size: int = 32,
    probe: bool = True,
    accelerator: Accelerator | None = None,
    on_samples: OnSamples = lambda count: None,
) -> Path:
    """The file with a checkpoint's `fisher` or `kronecker` statistics: from the cache, or measured now.

    Raises:
        EpimerError: whatever is wrong with the checkpoint, the base, the task or its data.
    """
    path = estimate.cached(statistic)
    if path.is_file():
        return path
    kinds: dict[Any, Callable[[Mapping[str, torch.Size]], Accumulator]] = {
        ("fisher", "per-sample"): FisherDiagonal,
        ("fisher", "squared-mean"): SquaredMean,
        ("kronecker", "per-sample"): KroneckerFactors,
    }
    make = kinds[statistic, estimate.sampling.kind]
    accelerator = accelerator or Accelerator()
    tensors, samples = _measure(estimate, lambda s, d: make(s.shapes), batch_size, probe, accelerator, on_samples)
    if accelerator.is_main_process:
        save_statistics(path, tensors, _metadata(estimate, samples), statistic)
    accelerator.wait_for_everyone()
    return path


def project_fisher(
    estimate: Estimate,
    bases: Mapping[str, TaggedBasis],
    *,
    batch_size: int = 32,
    probe: bool = True,
    on_samples: OnSamples = lambda count: None,
) -> dict[str, Tensor]:
    """The Fisher information on the tagged bases of one merge, as `PARTS["projected"]` names it. Not cached: another
    set of checkpoints has other bases."""

    def make(subject: Subject, device: torch.device) -> Accumulator:
        return ProjectedFisher(bases, device)

    return _measure(estimate, make, batch_size, probe, Accelerator(), on_samples)[0]


def _measure(
    estimate: Estimate,
    make: Callable[[Subject, torch.device], Accumulator],
    batch_size: int,
    probe: bool,
    accelerator: Accelerator,
    on_samples: OnSamples,
) -> tuple[dict[str, Tensor], int]:
    """Load model and data, and sweep over them. All processes take part."""
    sampling = estimate.sampling
    subject, batches = load_subject(estimate, batch_size, accelerator)
    if probe:
        probe_determinism(subject, batches, accelerator)
    found, count = sweep(
        subject,
        batches,
        make(subject, accelerator.device),
        labels=sampling.labels,
        seed=sampling.seed,
        precision=sampling.precision,
        accelerator=accelerator,
        on_samples=on_samples,
    )
    batches.check_broken(len(batches.samples) - count)
    batches.report_broken()
    return found, count


def load_subject(estimate: Estimate, batch_size: int, accelerator: Accelerator) -> tuple[Subject, ImageBatches]:
    """The checkpoint behind its task's head, and this process's share of the samples.

    Raises:
        EpimerError: whatever is wrong with the checkpoint, the base, the task or its data.
    """
    task = estimate.task
    with accelerator.main_process_first():  # one process fetches, the others find everything in place
        vision = model_folder(estimate.model)
        samples = samples_of(estimate)
        model = classifier_for(load_tower(vision, estimate.base), estimate.base, task, samples.class_names)
    subject = Subject(model, model.vision_names())
    share = (accelerator.process_index, accelerator.num_processes)
    return subject, ImageBatches(samples, model.pixels, batch_size, share)


def samples_of(estimate: Estimate) -> Samples:
    """The samples that it is taken on.

    Raises:
        DataError: they cannot be read.
    """
    sampling = estimate.sampling
    return read_samples(
        estimate.task,
        estimate.split,
        limit=sampling.samples,
        fraction=sampling.fraction,
        seed=sampling.seed,
        revision=None if Path(estimate.task.dataset).is_absolute() else estimate.revision,
        streaming=bool(sampling.streaming),
    )


def _metadata(estimate: Estimate, samples: int) -> StatisticsMetadata:
    """Hub ids and commits; of local folders their names only."""
    task = estimate.task
    return StatisticsMetadata(
        samples=samples,
        task=task.name,
        dataset=Path(task.dataset).name if Path(task.dataset).is_absolute() else task.dataset,
        dataset_revision=estimate.revision,
        model=estimate.model.title,
        model_sha=estimate.model_sha,
        labels=estimate.sampling.labels,
        seed=estimate.sampling.seed,
        kind=estimate.sampling.kind,
    )
