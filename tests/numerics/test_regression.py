"""The step of a calibration against its loss, and the prior against inputs along the task vector."""

from __future__ import annotations

import pytest
import torch

from hf_epimer.numerics.regression import anchored_step, prior


def test_the_step_is_where_the_error_is_smallest() -> None:
    """Against the dense solution, and against the loss itself by autograd."""
    generator = torch.Generator().manual_seed(0)
    m, n, rho = 4, 6, 0.3
    x, y, weight = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((30, n), (30, m), (m, n)))
    step = anchored_step(x.mT @ x, y.mT @ x - weight @ (x.mT @ x), rho)
    step.requires_grad_(True)
    loss = (y - x @ (weight + step).mT).square().sum() + rho * step.square().sum()
    (gradient,) = torch.autograd.grad(loss, step)
    assert float(gradient.abs().max()) < 1e-9


@pytest.mark.parametrize("outputs", [4, 2], ids=["one product", "two thin ones"])
def test_the_prior_is_what_inputs_along_the_task_vector_would_add(outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vector, gap = (torch.randn(outputs, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    gram_, cross = prior(vector, gap)
    assert float(gram_.diagonal().mean()) == pytest.approx(1.0)
    assert torch.allclose(cross, gap @ gram_)
    assert torch.allclose(gram_ / gram_[0, 0], (vector.mT @ vector) / (vector.mT @ vector)[0, 0])
    still = prior(torch.zeros(outputs, 6), gap.float())
    assert not bool(still[0].any()) and not bool(still[1].any())
