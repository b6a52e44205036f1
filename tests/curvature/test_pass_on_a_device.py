"""A pass for curvature on a stand-in for a GPU, with and without float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from helpers.accelerator import DEVICE, StandIn
from helpers.checkpoints import TINY
from hf_epimer.curvature.accumulators import (
    Accumulator,
    FisherDiagonal,
    GradientGram,
    KroneckerFactors,
    ProjectedFisher,
    SquaredMean,
)
from hf_epimer.curvature.data_pass import accumulate, probe_determinism, subject_of
from hf_epimer.models.classifier import Classifier, ZeroShotHead
from hf_epimer.models.clip import CLIP
from hf_epimer.numerics.subspace import TaggedBasis
from hf_epimer.tasks.images import Batch

Make = Callable[[Mapping[str, torch.Size], torch.device], Accumulator]


def projected(shapes: Mapping[str, torch.Size], device: torch.device) -> Accumulator:
    bases = {
        name: TaggedBasis(torch.eye(shape[0], 2), torch.eye(shape[1], 2), torch.ones(2), torch.zeros(2), 1)
        for name, shape in shapes.items()
        if len(shape) == 2
    }
    return ProjectedFisher(bases, device)


def measured(make: Make, device: torch.device, **options: Any) -> dict[str, Tensor]:
    """A statistic of a small classifier, which begins on the CPU as do its images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = CLIPVisionModel(CLIPVisionConfig(**TINY))
        head = ZeroShotHead(torch.randn(24, 32), torch.randn(5, 24), torch.tensor(2.0))
        pixels = torch.randn(7, 3, 16, 16)
    subject = subject_of(Classifier(tower, CLIP, head, None).eval())
    batches = [Batch(pixels, torch.tensor([0, 4, 2, 2, 1, 3, 0]), range(7))]
    accelerator: Any = SimpleNamespace(device=device, num_processes=1)
    probe_determinism(subject, batches, accelerator)
    return accumulate(subject, batches, make(subject.shapes, device), accelerator=accelerator, **options)[0]


@pytest.mark.parametrize("labels", ["true", "sampled"])
@pytest.mark.parametrize(
    "make",
    [
        *(lambda shapes, device, kind=kind: kind(shapes) for kind in (FisherDiagonal, SquaredMean)),
        *(lambda shapes, device, kind=kind: kind(shapes) for kind in (GradientGram, KroneckerFactors)),
        projected,
    ],
    ids=["diagonal", "squared mean", "gradient gram", "kronecker", "projected"],
)
def test_statistics_are_those_of_the_cpu(make: Make, labels: str) -> None:
    wanted = measured(make, torch.device("cpu"), labels=labels)
    with StandIn(float64=False):
        found = measured(make, DEVICE, labels=labels)
    assert found.keys() == wanted.keys()
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():  # keys' biases have gradients of rounding alone
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-7 * largest), name
