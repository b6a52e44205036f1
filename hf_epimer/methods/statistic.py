"""The statistics that methods ask for, and of which tensors each consists."""

from __future__ import annotations

from typing import Literal

Statistic = Literal["fisher", "gram", "kronecker", "projected", "outputs"]
"""What a method wants to know of every task beside its weights; `PARTS` says of which tensors it consists."""


PARTS: dict[Statistic, dict[str, str]] = {
    "fisher": {"fisher": ""},
    "gram": {"input": ".input_factor"},
    "kronecker": {"input": ".input_factor", "output": ".output_factor"},
    "projected": {"projected": "", "shrinkage": ".shrinkage"},
    "outputs": {"output": ".output_factor", "positions": ".positions"},
}
"""Statistic -> part -> what is added to a parameter's name in a file of such statistics.

For a weight W, m x n, that acts as y = W x, and the tagged basis of p atoms:

    fisher       v_t, the mean square of every entry of the per-sample gradient, shaped like W
    input        A_t = E[x x^T], n x n                output       S_t = E[g g^T], g the gradient of y, m x m
    projected    H_t = E[z z^T], z = S^T vec(dL/dW), p x p
    positions    the mean of |g|^2 at every position of the sequence: how much the loss hears of it
    shrinkage    the share of (tr H_t / p) I that Ledoit and Wolf's estimate mixes into H_t, in [0, 1], length 1
"""
