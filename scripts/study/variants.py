"""What was tried beside `kronecker-core` and calibration as they are, each as a function of a bench; see core.py.

None of these is part of the package. A layer that is no matrix, or for which nothing was measured, stays as in the
merge that the variant begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from bench import USUAL, Bench, Look, Tensors
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from hf_epimer.curvature.per_sample import Gradient, Outer
from hf_epimer.methods.statistic import FISHER_DIAGONAL, KRONECKER
from hf_epimer.numerics.subspace import TaggedBasis, capped_rank, tagged_basis, task_triples
from hf_epimer.numerics.sylvester import solve_sylvester

INPUT, OUTPUT = (part.suffix for part in KRONECKER.parts)
RANK = 16


def task_vectors(bench: Bench, name: str) -> Tensor:
    """D_t of one parameter, T x its shape."""
    return torch.stack([tuned[name] - bench.base[name] for tuned in bench.tuned])


def with_layers(start: Tensors, bench: Bench, change: Callable[[str, Tensor], Tensor | None]) -> Tensors:
    """A merge with the task vectors of its matrices put through `change` (None: as it was)."""
    weights = dict(start)
    for name, value in start.items():
        if value.ndim == 2:
            changed = change(name, value - bench.base[name])
            weights[name] = value if changed is None else bench.base[name] + changed
    return weights


def plain_bases(bench: Bench, rho: float = 1.0) -> Tensors:
    """`kronecker-core` on concatenated singular vectors as they are: not whitened, M_0 of truncated task arithmetic."""
    measured = bench.statistics(KRONECKER)

    def change(name: str, _: Tensor) -> Tensor | None:
        if f"{name}{INPUT}" not in measured[0]:
            return None
        d = task_vectors(bench, name)
        triples = task_triples(d, capped_rank(RANK, (d.shape[1], d.shape[2]), len(d)))
        u, v = (
            torch.cat([triple.u for triple in triples], 1).double(),
            torch.cat([triple.v for triple in triples], 1).double(),
        )
        lefts, rights, sides = [], [], []
        for task_vector, statistics in zip(d.double(), measured, strict=True):
            s, a = statistics[f"{name}{OUTPUT}"].double(), statistics[f"{name}{INPUT}"].double()
            left, right = u.mT @ s @ u, v.mT @ a @ v
            gain = 1 / (len(d) * left.diagonal().mean() * right.diagonal().mean())
            lefts.append(gain * left)
            rights.append(right)
            sides.append(gain * (u.mT @ s @ task_vector @ a @ v))
        start = torch.diag(torch.cat([triple.s for triple in triples]).double())
        left, right = torch.stack(lefts), torch.stack(rights)
        residual = torch.stack(sides).sum(0) - (left @ start @ right).sum(0)
        return (u @ solve_sylvester(left, right, rho, start, residual, tolerance=1e-6).x @ v.mT).float()

    return with_layers(bench.merge("tsv-m", {"rank": RANK}), bench, change)


class OnTheCore:
    """z_n = vec(U^T G_n V) and <G_n, D_t> of every sample: what the exact Fisher information says of a full core."""

    def __init__(self, bases: Mapping[str, TaggedBasis], task_vectors: Mapping[str, Tensor]) -> None:
        self.bases, self.task_vectors = bases, task_vectors
        self.sums: Tensors = {}

    def add(self, name: str, gradient: Gradient) -> None:
        if name not in self.bases or not isinstance(gradient, Outer):
            return
        basis = self.bases[name]
        z = torch.einsum("ntp,ntq->npq", gradient.left @ basis.u, gradient.right @ basis.v).flatten(1)
        along = (gradient.left * (gradient.right @ self.task_vectors[name].mT)).sum((1, 2))
        rows = torch.cat([z, along.unsqueeze(1)], dim=1)
        self.sums[name] = torch.cat([self.sums[name], rows]) if name in self.sums else rows

    def finish(self, sums: Mapping[str, Tensor], samples: int) -> Tensors:
        return dict(sums)


def exact_core(bench: Bench, rho: float = 1.0) -> Tensors:
    """`kronecker-core` with the exact Fisher information on the core instead of Kronecker factors.

    sum_t w_t E[z z^T] m + rho m = sum_t w_t E[z <G, D_t>] + rho m_0, whose left side has rank T N beside rho.
    """
    start = bench.merge("tsv-m", {"rank": RANK})
    bases: dict[str, TaggedBasis] = {}
    for name, value in start.items():
        if value.ndim == 2 and "encoder" in name:
            d = task_vectors(bench, name)
            basis = tagged_basis(d, capped_rank(RANK, (value.shape[0], value.shape[1]), len(d)))
            if basis is not None:
                bases[name] = basis
    projected = []
    for number, tuned in enumerate(bench.tuned):
        differences = {name: tuned[name] - bench.base[name] for name in bases}
        projected.append(bench.swept(number, OnTheCore(bases, differences)))

    def change(name: str, _: Tensor) -> Tensor | None:
        if name not in bases:
            return None
        basis, rows, sides = bases[name], [], []
        anchor = torch.diag(basis.s).double().flatten()
        for measured in projected:
            z, along = measured[name][:, :-1].double(), measured[name][:, -1].double()
            gain = z.shape[1] / (len(projected) * z.square().sum())
            rows.append(z * gain.sqrt())
            sides.append(along * gain.sqrt())
        z, along = torch.cat(rows), torch.cat(sides)
        right = along - z @ anchor
        small = z @ z.mT + rho * torch.eye(len(z), dtype=z.dtype)
        core = anchor + z.mT @ torch.linalg.solve(small, right)
        return basis.u @ core.view(basis.size, basis.size).float() @ basis.v.mT

    return with_layers(start, bench, change)


def flattened(bench: Bench, start: Tensors, power: float) -> Tensors:
    """Singular values to a power, with the norm of every matrix kept; power 0 is a flat spectrum."""

    def change(name: str, delta: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        bent = torch.where(s > 1e-5 * s[0], s.clamp_min(1e-12) ** power, torch.zeros_like(s))
        return (u * (bent * s.norm() / bent.norm().clamp_min(1e-12))) @ vh

    return with_layers(start, bench, change)


def calibrated_spectrum(bench: Bench, start: Tensors) -> Tensors:
    """Singular values damped where several tasks have put the same direction into the merge.

    With m_r = u_r^T Delta and t_r = u_r^T D_t, the merge has <m_r, t_r> / |t_r|^2 times what task t wants of direction
    r; a mean above 1 over tasks that want it is divided away.
    """

    def change(name: str, delta: Tensor) -> Tensor:
        d = task_vectors(bench, name)
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        merged, wanted = s.unsqueeze(1) * vh, u.mT @ d
        times = (wanted * merged).sum(-1) / wanted.square().sum(-1).clamp_min(1e-20)
        return (u * (s / times.clamp_min(1.0).mean(0))) @ vh

    return with_layers(start, bench, change)


def vectors_by_curvature(bench: Bench, start: Tensors) -> Tensors:
    """Biases and layer norms averaged by their own Fisher information, every task's of mean 1."""
    measured = bench.statistics(FISHER_DIAGONAL)
    merged = dict(start)
    for name, value in start.items():
        if value.ndim == 1:
            d = task_vectors(bench, name)
            weights = torch.stack([fisher[name] / fisher[name].mean().clamp_min(1e-30) for fisher in measured])
            merged[name] = bench.base[name] + (weights * d).sum(0) / weights.sum(0).clamp_min(1e-30)
    return merged


@torch.no_grad()
def last_norm(bench: Bench, start: Tensors, look: Look = USUAL, rho: float = 0.1) -> Tensors:
    """The last layer norm, behind all linear layers, fitted to each task's own: two numbers per channel."""
    norm: nn.LayerNorm = bench.tower.get_submodule("post_layernorm")
    inputs: dict[str, Tensor] = {}
    hook = norm.register_forward_hook(lambda module, arguments, output: inputs.update(x=arguments[0], y=output))
    gram = torch.zeros(*norm.weight.shape, 2, 2, dtype=torch.float64)
    cross = torch.zeros(*norm.weight.shape, 2, dtype=torch.float64)
    ours = torch.stack([start["vision_model.post_layernorm.weight"], start["vision_model.post_layernorm.bias"]], -1)
    for number, tuned in enumerate(bench.tuned):
        for batch in bench.looked_at(number, look):
            bench.put(tuned)
            bench.tower(pixel_values=batch.inputs)
            wanted = inputs["y"].double()
            bench.put(start)
            bench.tower(pixel_values=batch.inputs)
            plain = layer_norm(inputs["x"], norm.normalized_shape, eps=norm.eps).double()
            x = torch.stack([plain, torch.ones_like(plain)], dim=-1)
            gram += torch.einsum("nci,ncj->cij", x, x)
            cross += torch.einsum("nc,nci->ci", wanted - (x * ours).sum(-1), x)
    hook.remove()
    ridge = rho * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(2, dtype=torch.float64)
    step = torch.linalg.solve(gram + ridge, cross.unsqueeze(-1)).squeeze(-1).float()
    weights = dict(start)
    weights["vision_model.post_layernorm.weight"] = (ours + step)[:, 0]
    weights["vision_model.post_layernorm.bias"] = (ours + step)[:, 1]
    return weights
