"""From a checkpoint and its task to a file of statistics, through a local cache.

A file is cached under everything that decides its numbers: the checkpoint's and the data set's commits, the split, the
samples, the seed, the labels and the head. It is there as soon as its task is done, so an interrupted merge of eight
tasks repeats only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_epimer.checkpoints.cache import keep
from hf_epimer.curvature.accumulators import ACCUMULATORS, Accumulator, ProjectedFisher, Together, split
from hf_epimer.curvature.data_pass import Subject, accumulate, probe_determinism, subject_of
from hf_epimer.curvature.files import StatisticsMetadata, save_statistics
from hf_epimer.curvature.request import CurvatureRequest
from hf_epimer.methods.statistic import StatisticsFile
from hf_epimer.models.classifier import Classifier
from hf_epimer.models.head import classifier_for
from hf_epimer.models.loading import load_tower
from hf_epimer.models.zero_shot_check import warn_if_below_zero_shot
from hf_epimer.numerics.subspace import TaggedBasis
from hf_epimer.tasks.images import ImageBatches, read_images

OnSamples = Callable[[int], None]

KEPT = 24
"""Numbers that a backward pass needs of an image, per position, width and block: states, attention, the wider MLP."""

ROOM = 2**30
"""Bytes that these may take of a machine's memory; of an accelerator's the batch size decides."""


def estimate_files(
    request: CurvatureRequest,
    files: Sequence[StatisticsFile],
    *,
    batch_size: int = 32,
    probe: bool = True,
    accelerator: Accelerator | None = None,
    on_samples: OnSamples = lambda count: None,
) -> dict[StatisticsFile, Path]:
    """The files of a checkpoint's statistics: from the cache, or measured now, all that are missing in one pass.

    Raises:
        EpimerError: whatever is wrong with the checkpoint, the base, the task or its data.
    """
    paths = {file: request.cached(file) for file in files}
    missing = [file for file, path in paths.items() if not path.is_file()]
    if not missing:
        return paths
    accelerator = accelerator or Accelerator()

    def make(subject: Subject, device: torch.device) -> Together:
        return Together([ACCUMULATORS[file, request.gradients.kind](subject.shapes) for file in missing])

    tensors, samples = _measure(request, make, batch_size, probe, accelerator, on_samples)
    if accelerator.is_main_process:
        for file, part in zip(missing, split(tensors, len(missing)), strict=True):
            metadata = _metadata(request, samples)
            paths[file] = keep(paths[file], partial(save_statistics, tensors=part, metadata=metadata, file=file))
    accelerator.wait_for_everyone()
    return paths


def project_fisher(
    request: CurvatureRequest,
    bases: Mapping[str, TaggedBasis],
    *,
    batch_size: int = 32,
    probe: bool = True,
    on_samples: OnSamples = lambda count: None,
) -> dict[str, Tensor]:
    """The Fisher information on the tagged bases of one merge, named as in its row of the table.

    Not cached: another set of checkpoints has other bases.
    """

    def make(subject: Subject, device: torch.device) -> Accumulator:
        return ProjectedFisher(bases, device)

    return _measure(request, make, batch_size, probe, Accelerator(), on_samples)[0]


def _measure(
    request: CurvatureRequest,
    make: Callable[[Subject, torch.device], Accumulator],
    batch_size: int,
    probe: bool,
    accelerator: Accelerator,
    on_samples: OnSamples,
) -> tuple[dict[str, Tensor], int]:
    """Load model and data, and pass over them once. All processes take part."""
    gradients = request.gradients
    subject, batches = load_subject(request, batch_size, accelerator)
    subject.model.to(accelerator.device)
    if probe:
        probe_determinism(subject, batches, accelerator)
    if accelerator.is_main_process and isinstance(subject.model, Classifier):
        warn_if_below_zero_shot(subject.model, request.model.title, request.base, batches)
    found, count = accumulate(
        subject,
        batches,
        make(subject, accelerator.device),
        labels=gradients.labels,
        seed=request.images.sampling.seed,
        precision=gradients.precision,
        accelerator=accelerator,
        on_samples=on_samples,
    )
    batches.check_broken(len(batches.samples) - count)
    batches.report_broken()
    return found, count


def load_subject(request: CurvatureRequest, batch_size: int, accelerator: Accelerator) -> tuple[Subject, ImageBatches]:
    """The checkpoint behind its task's head, and this process's share of the samples.

    Raises:
        EpimerError: whatever is wrong with the checkpoint, the base, the task or its data.
    """
    task = request.images.task
    with accelerator.main_process_first():  # one process fetches, the others find everything in place
        folder = request.model.folder()
        samples = read_images(request.images)
        tower = load_tower(folder, request.base)
        model = classifier_for(tower, request.model, request.base, task, samples.class_names)
    share = (accelerator.process_index, accelerator.num_processes)
    size = min(batch_size, _images_at_once(model)) if accelerator.device.type == "cpu" else batch_size
    return subject_of(model), ImageBatches(samples, model.pixels, size, share)


def _images_at_once(model: Classifier) -> int:
    """Images whose activations fit into `ROOM` bytes of float32, at least one."""
    tower: Any = model.tower
    config = tower.config.to_dict()
    architecture = model.architecture
    numbers = KEPT * architecture.positions(config) * config[architecture.width] * config[architecture.depth]
    return max(1, ROOM // (4 * numbers))


def _metadata(request: CurvatureRequest, samples: int) -> StatisticsMetadata:
    """Hub ids and commits; of local folders their names only."""
    task = request.images.task
    return StatisticsMetadata(
        samples=samples,
        task=task.name,
        dataset=Path(task.dataset).name if Path(task.dataset).is_absolute() else task.dataset,
        dataset_revision=request.images.revision,
        model=request.model.title,
        model_sha=request.model.content_sha,
        labels=request.gradients.labels,
        seed=request.images.sampling.seed,
        kind=request.gradients.kind,
    )
