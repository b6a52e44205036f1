"""Linear layers that multiply by `product`: their outputs and gradients are those of `nn.Linear`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_epimer.models import linear
from hf_epimer.models.linear import with_fast_products


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all products taken."""
    shapes: list[tuple[int, ...]] = []

    def product(a: Tensor, b: Tensor) -> Tensor:
        shapes.append((*a.shape, b.shape[1]))
        return a @ b

    monkeypatch.setattr(linear, "product", product)
    monkeypatch.setattr(linear, "by_onednn", lambda like: like.dtype == torch.float32)
    return shapes


def network(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.GELU(), nn.Linear(5, 3, bias=bias)).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 4, 6), (7, 6), (0, 6)])
def test_outputs_and_gradients(bias: bool, shape: tuple[int, ...], counted: list[tuple[int, ...]]) -> None:
    plain = network(bias).float()
    fast = with_fast_products(copy.deepcopy(plain))
    results = []
    for module in (plain, fast):
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = module(pixels)
        output.square().sum().backward()
        results.append([output, pixels.grad, *(parameter.grad for parameter in module.parameters())])
    assert len(counted) == 6  # two layers, each forwards, and backwards for its input and its weight
    for own, other in zip(*results, strict=True):
        assert own.shape == other.shape
        torch.testing.assert_close(own, other)


def test_frozen_weights_cost_no_gradient(counted: list[tuple[int, ...]]) -> None:
    fast = with_fast_products(network().float()).requires_grad_(False)
    fast(torch.randn(2, 6).requires_grad_()).sum().backward()
    assert len(counted) == 4


def test_gradients_can_be_differentiated_again() -> None:
    a, b = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((4, 3), (2, 3)))
    assert torch.autograd.gradgradcheck(linear._Product.apply, (a, b))


def test_what_onednn_does_not_multiply_is_left_to_torch(counted: list[tuple[int, ...]]) -> None:
    fast = with_fast_products(network())
    assert fast(torch.randn(2, 6).double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert fast.float()(torch.randn(2, 6)).dtype == torch.bfloat16
    assert not counted
