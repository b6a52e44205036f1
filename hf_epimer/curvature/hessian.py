"""The exact projected Hessian of small models by Hessian-vector products (eq 11), to judge the approximations by.

    H[i, j] = (1/N) sum_n <S_i, d^2 loss_n S_j>,   S_j = U_j V_j^T

One Hessian-vector product per atom and batch: p times the cost of a training step, which is why nothing else uses it.
The Hessian of a network is not positive semidefinite in general; the Fisher information, which stands in for it, is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from hf_epimer.curvature.data_pass import Subject
from hf_epimer.numerics.subspace import TaggedBasis
from hf_epimer.tasks.images import Batch


def projected_hessian(
    subject: Subject, batches: Iterable[Batch], bases: Mapping[str, TaggedBasis]
) -> dict[str, Tensor]:
    """The Hessian of the mean loss at the model's weights, on the tagged basis of each layer by itself.

    Args:
        subject: its names must cover those of `bases`; every basis is of a matrix.

    Returns:
        Name -> H, p x p, symmetric, in the model's precision.
    """
    own = {name: inner for inner, name in subject.names.items()}
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in batches:
        count += len(batch.labels)
        for name, basis in bases.items():
            rows = _batch_hessian(subject, batch, own[name], basis)
            sums[name] = sums[name] + rows if name in sums else rows
    return {name: (total + total.mT) / (2 * count) for name, total in sums.items()}


def _batch_hessian(subject: Subject, batch: Batch, own: str, basis: TaggedBasis) -> Tensor:
    """Sum over the batch; row j is S^T of the Hessian times atom j."""
    weight = subject.model.get_parameter(own).detach().requires_grad_(True)
    frozen: Callable[..., Any] = lambda *a, **k: functional_call(subject.model, {own: weight}, a, k)  # noqa: E731
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
        loss = cross_entropy(subject.logits(frozen, batch.inputs), batch.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        rows = []
        for u, v in zip(basis.u.mT, basis.v.mT, strict=True):
            (product,) = torch.autograd.grad(u @ gradient @ v, weight, retain_graph=True)
            rows.append(basis.project(product))
    return torch.stack(rows)
