"""Steps of Muon against a singular value decomposition, of factors against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_epimer.numerics.lowrank import low_rank
from hf_epimer.pipeline.refinement.muon import FactoredMuon, Muon, nearly_polar


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_a_step_of_muon_is_the_polar_factor_of_the_momentum(shape: tuple[int, int]) -> None:
    """Two steps against an SVD: every direction of the momentum moves by about the rate, whatever its size."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape))
    muon = Muon([{"params": [weight], "lr": 0.1}], torch.float32)
    momentum = torch.zeros(shape)
    for scale in (1e-6, 1e6):
        before, weight.grad = weight.detach().clone(), scale * torch.randn(shape, generator=generator)
        muon.step()
        momentum = 0.9 * momentum + 0.1 * weight.grad
        u, _, vh = torch.linalg.svd(0.9 * momentum + 0.1 * weight.grad, full_matrices=False)
        moved = u.T @ (before - weight.detach()) @ vh.T / (0.1 * max(shape) ** 0.5)
        assert torch.allclose(moved, moved.diagonal().diag(), atol=1e-3)
        assert float(moved.diagonal().min()) > 0.6 and float(moved.diagonal().max()) < 1.25


def test_a_step_without_a_gradient_is_none() -> None:
    assert torch.equal(nearly_polar(torch.zeros(3, 5)), torch.zeros(3, 5))
    weight = nn.Parameter(torch.ones(3, 5))
    Muon([{"params": [weight], "lr": 0.1}], torch.float32).step()
    assert torch.equal(weight.detach(), torch.ones(3, 5))


def test_a_factored_step_keeps_the_rank_and_moves_as_far_as_any() -> None:
    """dL/dB = G A^T and dL/dA = B^T G: against autograd through B A, at equal signs of every direction."""
    generator = torch.Generator().manual_seed(0)
    base, b, a, goal = (torch.randn(s, generator=generator) for s in ((6, 60), (6, 3), (3, 60), (6, 60)))
    weight = nn.Parameter(base + b @ a)
    muon = FactoredMuon([{"params": [weight], "lr": 0.01, "update": low_rank(b, a)}], torch.float32)
    factors = [muon.state[weight][name].clone().requires_grad_() for name in "ba"]
    losses = []
    for step in range(20):
        before = weight.detach().clone()
        loss = (weight - goal).square().sum()
        losses.append(float(loss.detach()))
        weight.grad = torch.autograd.grad(loss, weight)[0]
        muon.step()
        moved = weight.detach() - before
        if not step:
            assert 0.7 * 0.01 < float(moved.square().mean().sqrt()) < 1.5 * 0.01
            slopes = torch.autograd.grad((base + factors[0] @ factors[1] - goal).square().sum(), factors)
            for factor, name, slope in zip(factors, "ba", slopes):
                u, _, vh = torch.linalg.svd(slope, full_matrices=False)
                along = u.T @ (factor.detach() - muon.state[weight][name]) @ vh.T
                assert torch.allclose(along, along.diagonal().diag(), atol=1e-4) and float(along.diagonal().min()) > 0
    assert losses == sorted(losses, reverse=True)
    values = torch.linalg.svdvals(weight.detach() - base)
    assert float(values[3]) < 1e-5 < float(values[2])
