"""The distance and the loss against plain computations, and the head that features are read by."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from hf_epimer.models.classifier import LinearHead, ZeroShotHead
from hf_epimer.pipeline.refinement.objective import loss, squared_distances


def test_the_loss_is_the_weighted_sum_of_the_distances() -> None:
    assert loss([0.2, 0.8], [3.0, 0.5]) == pytest.approx(1.0)


def test_a_distance_is_twice_what_the_cosine_lacks() -> None:
    one, other = (normalize(torch.randn(5, 7, generator=torch.Generator().manual_seed(s)), dim=1) for s in (0, 1))
    assert torch.allclose(squared_distances(one, other), 2 - 2 * (one * other).sum(1), atol=1e-6)


def test_a_head_reads_what_it_embeds() -> None:
    features, projection, rows = (torch.randn(*s, dtype=torch.float64) for s in ((4, 6), (5, 6), (3, 5)))
    zero_shot = ZeroShotHead(projection, rows, torch.tensor(1.0))
    embedded = zero_shot.embed(features)
    assert torch.allclose(embedded, normalize(features @ projection.T, dim=1))
    assert torch.allclose(zero_shot(features), torch.tensor(1.0).exp() * embedded @ normalize(rows, dim=1).T)
    linear = LinearHead(torch.randn(3, 6, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(linear.embed(features), features)
