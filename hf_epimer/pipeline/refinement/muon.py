"""Muon: steps of a matrix along the polar factor of its momentum.

    M <- b M + (1 - b) G        N = b M + (1 - b) G        W <- W - rate sqrt(max(m, n)) polar(N)

Of all steps of one spectral norm, that is the steepest; a preconditioner by both sides' second moments, as in Shampoo
and K-FAC, comes to it when they are those of one gradient. An entry of the step has `rate` as its root mean square.

Where a matrix is to keep its rank, as in an adapter, W = W_0 + B A and both factors take such steps:

    dL/dB = G A^T       dL/dA = B^T G       G = dL/dW

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; torch has it from 2.9 on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MOMENTUM = 0.9
"""b."""

ITERATIONS = 5
"""Of Newton and Schulz."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's: after `ITERATIONS` steps all but the smallest singular values are between 0.7 and 1.2, which is enough."""


class Muon(Optimizer):
    """For matrices, m x n.

    Args:
        groups: of parameters, each with its rate, `lr`.
        dtype: of the iteration's products.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], dtype: torch.dtype) -> None:
        super().__init__(groups, {})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                weight.sub_(_direction(state["momentum"], weight.grad, self.dtype), alpha=group["lr"])


class FactoredMuon(Optimizer):
    """For matrices that keep the rank of what they were changed by.

    Args:
        groups: of one parameter each, with its rate, `lr`, and its change so far as `update`, a `LowRank` of rank > 0.
        dtype: of the iteration's products.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], dtype: torch.dtype) -> None:
        super().__init__(groups, {})
        self.dtype = dtype
        self.fixed: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            (weight,) = group["params"]
            b, a = (factor.to(weight).contiguous() for factor in group["update"].balanced())
            self.fixed[weight] = weight.detach().flatten(1) - b @ a
            momenta = {f"{name}_momentum": torch.zeros_like(factor) for name, factor in (("b", b), ("a", a))}
            self.state[weight] = {"b": b, "a": a, **momenta}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both factors of every matrix that has a gradient, which together move it by its rate."""
        for group in self.param_groups:
            (weight,) = group["params"]
            if weight.grad is None:
                continue
            state, gradient = self.state[weight], weight.grad.flatten(1)
            b, a = state["b"], state["a"]
            rates = [group["lr"] * math.sqrt(size / 2) for size in (a.shape[1], b.shape[0])]
            of_b = rates[0] / a.norm() * _direction(state["b_momentum"], gradient @ a.mT, self.dtype)
            of_a = rates[1] / b.norm() * _direction(state["a_momentum"], b.mT @ gradient, self.dtype)
            b.sub_(of_b)
            a.sub_(of_a)
            weight.copy_((self.fixed[weight] + b @ a).view_as(weight))


def _direction(momentum: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """What to take off, of root mean square about 1; the momentum moves on."""
    momentum.lerp_(gradient, 1 - MOMENTUM)
    ahead = gradient.lerp(momentum, MOMENTUM)
    return math.sqrt(max(gradient.shape)) * nearly_polar(ahead.to(dtype)).to(gradient)


def nearly_polar(matrix: Tensor) -> Tensor:
    """P f(S) Q^T of P S Q^T, f(S) between 0.7 and 1.2 but for the smallest of S; 0 of 0. No decomposition.

    Args:
        matrix: m x n, of any scale.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = wide / wide.norm().clamp_min(torch.finfo(torch.float32).tiny)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.mT
