"""Linear layers on processors whose BLAS leaves half of them idle: see `hf_epimer.numerics.product`.

y = x W^T + b        grad x = g W,  grad W = g^T x,  grad b = sum g        every product by `product`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_epimer.numerics.product import by_onednn, product


def with_fast_products(module: nn.Module) -> nn.Module:
    """The module itself, whose linear layers multiply by `product` where that is not torch's own way."""
    for each in module.modules():
        if type(each) is nn.Linear:
            each.__class__ = _FastLinear  # keeps parameters, names and hooks as they are
    return module


class _FastLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if not by_onednn(input) or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        rows: Tensor = _Product.apply(input.reshape(-1, self.in_features), self.weight)
        output = rows.view(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias


class _Product(torch.autograd.Function):
    """A B^T for A [n, d] and B [m, d]; may be differentiated any number of times."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return product(a, b.mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        of_a = _Product.apply(gradient, b.mT) if ctx.needs_input_grad[0] else None
        of_b = _Product.apply(gradient.mT, a.mT) if ctx.needs_input_grad[1] else None
        return of_a, of_b
