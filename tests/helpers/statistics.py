"""Statistics of every kind for the tiny tower, in memory."""

from __future__ import annotations

import torch

from helpers.checkpoints import StateDict, tiny_fisher, tiny_state
from hf_epimer.methods import METHODS
from hf_epimer.methods.statistic import FISHER_DIAGONAL, GRADIENT_GRAM, GRAM, KRONECKER


def grams(seed: int) -> StateDict:
    """A Gram matrix for every Linear weight."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in tiny_state(0).items():
        if tensor.ndim == 2 and "position" not in name:
            x = torch.randn(200, tensor.shape[1], generator=generator)
            found[name] = x.mT @ x / 200
    return found


def factors(seed: int) -> StateDict:
    """Kronecker factors for every Linear weight."""
    generator = torch.Generator().manual_seed(seed)
    found = {f"{name}.input_factor": value for name, value in grams(seed).items()}
    for name, value in tiny_state(0).items():
        if f"{name}.input_factor" in found:
            g = torch.randn(200, len(value), generator=generator)
            found[f"{name}.output_factor"] = g.mT @ g / 200
    return found


def gradient_grams(seed: int) -> StateDict:
    """Gradient-weighted Gram matrices for every Linear weight."""
    return {f"{name}.gradient_gram": value for name, value in grams(seed).items()}


def statistics(method: str, tasks: int) -> list[StateDict] | None:
    needs = METHODS[method].needs
    if needs is None:
        return None
    make = {FISHER_DIAGONAL: tiny_fisher, GRAM: grams, GRADIENT_GRAM: gradient_grams, KRONECKER: factors}[needs]
    return [make(100 + t) for t in range(tasks)]


def tiny_kronecker(seed: int) -> StateDict:
    """Kronecker factors with a decaying spectrum for every matrix, as they are on disk."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in tiny_state(0).items():
        if value.ndim == 2:
            for part, size in (("output", value.shape[0]), ("input", value.shape[1])):
                x = torch.randn(3 * size, size, generator=generator) * torch.logspace(0, -1, size)
                found[f"{name}.{part}_factor"] = x.mT @ x / len(x)
    return found
