"""Slow and obviously right: every method of the comparison in dense float64, straight from its formula.

One layer at a time. `base` is m x n, `tuned` a list of T such matrices, `fisher` a list of T Fisher diagonals.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def polar(m: Tensor) -> Tensor:
    p, _, qh = torch.linalg.svd(m, full_matrices=False)
    return p @ qh


def basis(deltas: list[Tensor], rank: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """U, V, the singular values and the capped rank (eq 10)."""
    k = min(rank, min(deltas[0].shape) // len(deltas))
    triples = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    u = polar(torch.cat([u[:, :k] for u, _, _ in triples], dim=1))
    v = polar(torch.cat([vh[:k].mT for _, _, vh in triples], dim=1))
    return u, v, torch.cat([s[:k] for _, s, _ in triples]), k


def subspace_matrix(u: Tensor, v: Tensor) -> Tensor:
    """S, mn x p: column i is vec(U_i V_i^T)."""
    return torch.stack([torch.outer(u[:, i], v[:, i]).flatten() for i in range(u.shape[1])], dim=1)


def projected_metrics(s: Tensor, fisher: list[Tensor], damping: float, normalize: str) -> list[Tensor]:
    """H_t = S^T diag(v_t + eps) S (eq 12), divided by its trace for `trace`."""
    metrics = []
    for v in fisher:
        v = v.double()
        h = s.mT @ ((v + damping * v.mean()).flatten()[:, None] * s)
        metrics.append(h / torch.trace(h) if normalize == "trace" else h)
    return metrics


def epimer(
    base: Tensor,
    tuned: list[Tensor],
    fisher: list[Tensor],
    *,
    rank: int = 32,
    alpha: float = 1.0,
    aggregator: str = "sum",
    coordinates: str = "projected",
    normalize: str = "none",
    damping: float = 1e-6,
    weights: list[float] | None = None,
) -> tuple[Tensor, float]:
    """The merged weight (eq 13 or 14) and eta in the units of the metrics."""
    tasks = len(tuned)
    l = weights or [1 / tasks] * tasks  # noqa: E741  (the paper's letter)
    deltas = [w.double() - base.double() for w in tuned]
    u, v, sigma, k = basis(deltas, rank)
    s = subspace_matrix(u, v)
    h = projected_metrics(s, fisher, damping, normalize)
    if coordinates == "projected":
        c = [s.mT @ d.flatten() for d in deltas]
    else:
        c = [torch.zeros_like(sigma) for _ in deltas]
        for t in range(tasks):
            c[t][t * k : (t + 1) * k] = sigma[t * k : (t + 1) * k]
    h_bar = sum(l[t] * h[t] for t in range(tasks))
    x = torch.linalg.solve(h_bar, sum(l[t] * h[t] @ c[t] for t in range(tasks)))
    c_bar = sum(l[t] * c[t] for t in range(tasks))
    spread = sum(l[t] * (h[t] - h_bar) @ (c[t] - c_bar) for t in range(tasks))
    eta = float(spread @ torch.linalg.solve(h_bar, spread))
    scale = alpha * (tasks if aggregator == "sum" else 1)
    return base.double() + (s @ x * scale).view(base.shape), eta


def diagnosis(
    deltas: list[Tensor],
    fisher: list[Tensor],
    *,
    rank: int,
    damping: float = 1e-6,
    weights: list[float] | None = None,
) -> dict[str, Any]:
    """Everything that is said of a layer before a merge, from the definitions (Theorems 2 and 3)."""
    tasks = len(deltas)
    l = weights or [1 / tasks] * tasks  # noqa: E741
    d = [delta.double().flatten() for delta in deltas]
    steep = [(v.double() + damping * v.double().mean()).flatten() for v in fisher]
    u, v, _, k = basis([delta.double() for delta in deltas], rank)
    s = subspace_matrix(u, v)
    c = [s.mT @ own for own in d]
    found: dict[str, Any] = {
        "kept": [float((s @ own).square().sum()) for own in c],
        "singular": [float(torch.linalg.svdvals(delta.double())[:k].square().sum()) for delta in deltas],
    }
    for suffix, normalize in (("", "none"), ("_trace", "trace")):
        h = projected_metrics(s, fisher, damping, normalize)
        h_bar = sum(l[t] * h[t] for t in range(tasks))
        c_bar = sum(l[t] * c[t] for t in range(tasks))
        correlation = sum(l[t] * (h[t] - h_bar) @ (c[t] - c_bar) for t in range(tasks))
        found["eta" + suffix] = float(correlation @ torch.linalg.solve(h_bar, correlation))
        found["spread" + suffix] = float(sum(l[t] * (c_bar - c[t]) @ h[t] @ (c_bar - c[t]) for t in range(tasks)))
        if normalize == "none":
            x = torch.linalg.solve(h_bar, sum(l[t] * h[t] @ c[t] for t in range(tasks)))
            found["variance"] = float(sum(l[t] * (x - c[t]) @ h[t] @ (x - c[t]) for t in range(tasks)))
            scaled = len(x) * h_bar / torch.trace(h_bar)
            found["isotropy"] = float(torch.linalg.matrix_norm(scaled - torch.eye(len(x)), ord=2))
    r = [d[t] - s @ c[t] for t in range(tasks)]
    found["residual"] = float(sum(l[t] * (steep[t] * r[t]) @ r[t] for t in range(tasks)))
    found["loss"] = 0.5 * float(sum(l[t] * steep[t] @ (s @ x - d[t]).square() for t in range(tasks)))
    found["bound"] = 0.5 * (found["variance"] ** 0.5 + found["residual"] ** 0.5) ** 2
    found["traces"] = [
        l[t] * float(torch.trace(s.mT @ (fisher[t].double().flatten()[:, None] * s))) for t in range(tasks)
    ]
    return found


def tsv_m(base: Tensor, tuned: list[Tensor], *, rank: int | None = None, alpha: float = 1.0) -> Tensor:
    deltas = [w.double() - base.double() for w in tuned]
    u, v, sigma, _ = basis(deltas, rank or min(base.shape))
    return base.double() + alpha * u @ torch.diag(sigma) @ v.mT


def iso_c(base: Tensor, tuned: list[Tensor], *, alpha: float = 1.0) -> Tensor:
    total = sum(w.double() - base.double() for w in tuned)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    return base.double() + alpha * s.mean() * u @ vh


def iso_cts(base: Tensor, tuned: list[Tensor], *, alpha: float = 1.0, common: float = 0.8) -> Tensor:
    deltas = [w.double() - base.double() for w in tuned]
    smaller = min(base.shape)
    own = round((smaller - int(smaller * common)) / len(deltas))
    shared = smaller - own * len(deltas)
    u, s, vh = torch.linalg.svd(sum(deltas), full_matrices=False)
    us, ss, vs = [u[:, :shared]], [s[:shared]], [vh[:shared].mT]
    for d in deltas:
        a, b, ch = torch.linalg.svd(d - us[0] @ us[0].mT @ d, full_matrices=False)
        us.append(a[:, :own])
        ss.append(b[:own])
        vs.append(ch[:own].mT)
    flat = torch.cat(ss).mean()
    return base.double() + alpha * flat * polar(torch.cat(us, 1)) @ polar(torch.cat(vs, 1)).mT


def ties(
    states: list[list[Tensor]], bases: list[Tensor], *, density: float = 0.2, alpha: float = 1.0, election: str = "mass"
) -> list[Tensor]:
    """The whole model at once: `bases` lists its parameters, `states[t]` those of task t."""
    flat = torch.stack([torch.cat([(w - b).double().flatten() for w, b in zip(ws, bases)]) for ws in states])
    kept = round(density * flat.shape[1])
    for row in flat:
        threshold = row.abs().sort(descending=True).values[kept - 1]
        row[row.abs() < threshold] = 0
    votes = flat if election == "mass" else flat.sign()
    sign = votes.sum(0).sign()
    agreeing = (flat.sign() == sign) & (sign != 0)
    merged = alpha * (flat * agreeing).sum(0) / agreeing.sum(0).clamp_min(1)
    pieces = merged.split([b.numel() for b in bases])
    return [b.double() + piece.view(b.shape) for b, piece in zip(bases, pieces)]


def on_one_scale(fisher: list[Tensor]) -> list[Tensor]:
    """Every task's Fisher at the mean of all."""
    mean = torch.stack(fisher).double().mean()
    return [v.double() * mean / v.double().mean() for v in fisher]


def fisher_average(base: Tensor, tuned: list[Tensor], fisher: list[Tensor], floor: float = 1e-6) -> Tensor:
    mean = torch.stack(fisher).double().mean()
    f = [v.double() + floor * mean for v in fisher]
    return sum(v * w.double() for v, w in zip(f, tuned)) / sum(f)


def gradient_matching(base: Tensor, tuned: list[Tensor], fisher: list[Tensor], prior: float = 1e-8) -> Tensor:
    h = [v.double() + prior for v in fisher]
    step = sum(v * (w.double() - base.double()) for v, w in zip(h, tuned)) / sum(h)
    return base.double() + step


def regmean(tuned: list[Tensor], grams: list[Tensor], decay: float = 0.95) -> Tensor:
    a = [decay * g.double() + (1 - decay) * torch.diag(g.double().diagonal()) for g in grams]
    return sum(w.double() @ g for w, g in zip(tuned, a)) @ torch.linalg.inv(sum(a))


def kronecker_core(
    base: Tensor,
    tuned: list[Tensor],
    outputs: list[Tensor] | None,
    inputs: list[Tensor] | None,
    weights: list[float],
    rank: int,
    rho: float,
    scaffold: str,
) -> Tensor:
    """The full core's equation as one dense system in vec(M); identity S_t, and A_t = D_t^T D_t, where not given."""
    deltas = [w.double() - base.double() for w in tuned]
    u, v, sigma, k = basis(deltas, rank)
    if scaffold == "tsv-m":
        start = torch.diag(sigma * torch.tensor(weights, dtype=sigma.dtype).repeat_interleave(k) * len(tuned))
    else:
        left, s, right = torch.linalg.svd(len(tuned) * sum(w * d for w, d in zip(weights, deltas)))
        n = len(s)
        start = u.mT @ (left[:, :n] @ right[:n] * s.mean()) @ v
    system, right_side = rho * torch.eye(start.numel(), dtype=torch.float64), rho * start
    for t, (w, d) in enumerate(zip(weights, deltas)):
        s = outputs[t].double() if outputs else torch.eye(len(d), dtype=torch.float64)
        a = inputs[t].double() if inputs else d.mT @ d
        left, right = u.mT @ s @ u, v.mT @ a @ v
        gain = w * len(sigma) ** 2 / (left.trace() * right.trace())
        system = system + gain * torch.kron(left, right)
        right_side = right_side + gain * u.mT @ s @ d @ a @ v
    core = torch.linalg.solve(system, right_side.flatten()).view(start.shape)
    return base.double() + u @ core @ v.mT


def epimer_core(
    base: Tensor,
    tuned: list[Tensor],
    grams: list[Tensor | None],
    weights: list[float],
    rho: float,
    mixture: float = 1.0,
    curvature_alone: bool = False,
) -> Tensor:
    """The minimum of its objective, one dense system in vec(D); the start is the sum, as far as task vectors agree."""
    deltas = [w.double() - base.double() for w in tuned]
    mean = sum(w * d for w, d in zip(weights, deltas))
    length = sum(w * float(d.square().sum()) for w, d in zip(weights, deltas)) / float(mean.square().sum())
    start = mean * min(length, len(tuned))

    system, right = torch.zeros(base.numel(), base.numel(), dtype=torch.float64), torch.zeros(base.numel())
    for w, d, a in zip(weights, deltas, grams):
        metric = own = d.mT @ d
        if a is not None:
            metric = a.double()
            if not curvature_alone:
                metric = unit_mean(metric) + mixture * unit_mean(own)
        metric = unit_along(metric, d)
        system = system + w * torch.kron(torch.eye(len(base), dtype=torch.float64), metric)
        right = right + w * (d @ metric).flatten()
    pull = rho * system.diagonal().mean()
    system = system + pull * torch.eye(base.numel(), dtype=torch.float64)
    return base.double() + torch.linalg.solve(system, right + pull * start.flatten()).view(base.shape)


def unit_mean(metric: Tensor) -> Tensor:
    """The metric scaled to a mean diagonal of 1."""
    return metric / metric.diagonal().mean()


def unit_along(metric: Tensor, delta: Tensor) -> Tensor:
    """The metric scaled to curvature 1 on average along a task vector."""
    return metric * delta.square().sum() / (delta @ metric @ delta.mT).trace()


def wudi(base: Tensor, tuned: list[Tensor], weights: list[float], rho: float) -> Tensor:
    """The minimum of its objective plus rho times the mean curvature times |D - sum of task vectors|^2, in vec(D)."""
    deltas = [w.double() - base.double() for w in tuned]
    start = len(tuned) * sum(w * d for w, d in zip(weights, deltas))
    curvatures = [w * d.mT @ d / d.square().sum() for w, d in zip(weights, deltas)]
    pull = rho * sum(curvatures).trace() / len(curvatures[0])
    eye = torch.eye(len(base), dtype=torch.float64)
    system = torch.kron(eye, sum(curvatures)) + pull * torch.eye(base.numel(), dtype=torch.float64)
    right = sum(d @ a for d, a in zip(deltas, curvatures)) + pull * start
    return base.double() + torch.linalg.solve(system, right.flatten()).view(base.shape)


def relative_error(found: Tensor, expected: Tensor, base: Tensor) -> float:
    """Of the merged task vector, in the Frobenius norm: the base would hide any error."""
    delta = expected.double() - base.double()
    return float((found.double() - expected.double()).norm() / delta.norm())


def kronecker_mean(
    deltas: list[Tensor], outputs: list[Tensor], inputs: list[Tensor], weights: list[float], rho: float
) -> Tensor:
    """argmin sum l_t tr(S_t (M - D_t) A_t (M - D_t)^T) + rho ||M - mean||^2, as one dense system in vec(M)."""
    mean = sum(w * d for w, d in zip(weights, deltas))
    system = sum(w * torch.kron(s, a) for w, s, a in zip(weights, outputs, inputs))
    damping = rho * torch.eye(len(system), dtype=system.dtype)
    right = (
        sum(w * (s @ d @ a).flatten() for w, s, d, a in zip(weights, outputs, deltas, inputs)) + rho * mean.flatten()
    )
    return torch.linalg.solve(system + damping, right).view(mean.shape)
