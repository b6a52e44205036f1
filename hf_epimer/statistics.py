"""The diagonal of the empirical Fisher information of a classifier's vision tower, and its file.

For N samples (x_i, y_i) with their true labels and every parameter theta of the tower:

    F = 1/N * sum_i (d/d theta  -log p(y_i | x_i))^2          shaped like theta, fp32, never negative

The square is taken per sample, before averaging; the gradient of a batch's mean would give something else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_epimer.classifier import Classifier
from hf_epimer.errors import DataError

FISHER_FORMAT = "hf-epimer.fisher/1"


@dataclass(frozen=True)
class FisherMetadata:
    """Where an estimate comes from; written as strings into the file's header."""

    samples: int
    task: str
    dataset: str
    dataset_revision: str
    model: str
    model_sha: str
    labels: str
    seed: int


def estimate_fisher(model: Classifier, images: Sequence[Image.Image], labels: Sequence[int]) -> dict[str, Tensor]:
    """Mean of squared per-sample gradients, one tensor per tower parameter, named as on disk."""
    if len(images) != len(labels) or not len(images):
        raise DataError(f"the Fisher information needs as many images as labels: {len(images)} and {len(labels)} given")
    classes = len(model.head)
    parameters = model.vision_parameters()
    total = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in parameters.items()}
    for image, label in zip(images, labels, strict=True):
        if not 0 <= label < classes:
            raise DataError(f"label {label} is outside the {classes} classes of the head")
        logits = model(model.pixels([image]))
        loss = cross_entropy(logits, torch.tensor([label], device=logits.device))
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for sum_of_squares, gradient in zip(total.values(), gradients, strict=True):
            sum_of_squares += gradient.float().square()
    return {name: (value / len(images)).cpu() for name, value in total.items()}


def save_fisher(path: str | Path, fisher: dict[str, Tensor], metadata: FisherMetadata) -> None:
    """Write the estimate; the file appears under its name only when it is complete."""
    path = Path(path)
    header = {"format": FISHER_FORMAT} | {key: str(value) for key, value in asdict(metadata).items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: value.float().contiguous() for name, value in fisher.items()}, unfinished, metadata=header)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
