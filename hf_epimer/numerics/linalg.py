"""Truncated SVD, polar factor, conjugate gradients and extreme eigenvalues.

    truncated_svd       A ~ U diag(s) V^T, top k triples                     block Krylov, Gram matrix or LAPACK
    polar_factor        argmin_{Q^T Q = I} ||M - Q||_F                       orthogonal Procrustes whitening
    conjugate_gradient  H x = b for a symmetric positive definite operator
    extreme_eigenvalues smallest and largest of a symmetric operator          Lanczos

Shapes: A is m x n, M is m x p with p <= m, vectors have length p.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_epimer.numerics.product import product


class SVD(NamedTuple):
    """Top singular triples, largest first: `u` m x k, `s` k, `v` n x k."""

    u: Tensor
    s: Tensor
    v: Tensor


NARROW, WIDE = 8, 16
"""Directions per Krylov block: narrow ones converge in fewer dimensions, wide ones keep a matrix product busier."""

MANY = 48
"""Number of triples from which on wide blocks pay."""

KRYLOV_SHARE = 0.55
"""Largest share of min(m, n) worth spending on a Krylov basis; beyond it a dense decomposition is cheaper."""


def truncated_svd(a: Tensor, k: int, *, tolerance: float = 1.2e-4, exact: bool = False, seed: int = 0) -> SVD:
    """Top-k singular triples of `a`.

    Randomised block Krylov iteration (Musco and Musco, NeurIPS 2015) on the smaller side, with the basis grown until
    the residual says that U diag(s) V^T is right to about `tolerance`. Where k is a large part of min(m, n), the matrix
    is small, or the singular values decay too slowly to be told apart, the eigenvectors of the smaller Gram matrix take
    over, as far as squaring has left their images orthogonal to `tolerance`; else a dense decomposition.

    Args:
        a: m x n, finite, float32 or float64.
        k: 1 <= k <= min(m, n).
        tolerance: relative Frobenius error allowed in the rank-k approximation.
        exact: always decompose densely.
        seed: of the start block; the same seed gives the same bits.

    Returns:
        The triples, largest first. Singular vectors come from one decomposition, so that signs match.
    """
    smaller = min(a.shape)
    if not 1 <= k <= smaller:
        raise ValueError(f"rank {k} is outside 1..{smaller}")
    if exact:
        return _dense_svd(a, k)
    wide = a.shape[0] < a.shape[1]
    tall, found = a.mT if wide else a, None
    if smaller >= 128 and 3 * k <= KRYLOV_SHARE * smaller:
        found = _block_krylov(tall, k, tolerance, seed)
    if found is None:
        found = _from_gram(tall, k, tolerance)
    if found is None:
        return _dense_svd(a, k)
    return SVD(found.v, found.s, found.u) if wide else found


def _from_gram(a: Tensor, k: int, tolerance: float) -> SVD | None:
    """From the eigenvectors of A^T A, for m >= n: half the work of a decomposition of A, and less.

    The A v_i are orthogonal in exact arithmetic; None where rounding has left them further from it than `tolerance`, as
    happens with singular values far below the largest.
    """
    _, vectors = torch.linalg.eigh(product(a.mT, a))
    v = vectors[:, -k:].flip(-1)
    image = product(a, v)
    s = image.norm(dim=0)
    if not bool((s > 0).all()):
        return None
    u = image / s
    if float(product(u.mT, u).fill_diagonal_(0.0).norm()) > tolerance * math.sqrt(k):
        return None
    s, order = s.sort(descending=True)
    return SVD(u[:, order], s, v[:, order])


def _dense_svd(a: Tensor, k: int) -> SVD:
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return SVD(u[:, :k], s[:k], vh[:k].mT)


def _block_krylov(a: Tensor, k: int, tolerance: float, seed: int) -> SVD | None:
    """Rayleigh-Ritz on span{X, (A^T A) X, (A^T A)^2 X, ...} for m >= n; None when it does not pay.

    Rows of `q` are the orthonormal Krylov basis, rows of `y` are its image under A; only the n side is orthogonalised.
    The residual of a Ritz pair of A^T A lives in the block that would come next, so it costs no product of its own.
    """
    m, n = a.shape
    width = NARROW if k < MANY else WIDE
    largest = int(KRYLOV_SHARE * n) // width * width
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(width, n, generator=generator, dtype=a.dtype).to(a.device)
    a, transposed = a.contiguous(), a.mT.contiguous()  # a product reads either of them as it lies
    q, y = a.new_empty(largest, n), a.new_empty(largest, m)
    block = torch.linalg.qr(product(product(start, a.mT), transposed.mT).mT)[0].mT
    size, check = 0, math.ceil(3 * k / width) * width
    while size < largest:
        q[size : size + width] = block
        image = y[size : size + width] = product(block, a.mT)
        size += width
        basis = q[:size]
        following = product(image, transposed.mT)
        # in exact arithmetic only the last two blocks matter (Lanczos); all of them are needed against rounding
        for rows in (basis[-2 * width :], basis):
            following = following - (following @ rows.mT) @ rows
        orthonormal, coupling = torch.linalg.qr(following.mT)
        block = orthonormal.mT
        if size < check:
            continue
        ritz_values, ritz_vectors = torch.linalg.eigh(product(y[:size], y[:size].mT))
        ritz_vectors = ritz_vectors[:, -k:].flip(-1)
        s = ritz_values[-k:].flip(-1).clamp_min(0).sqrt()
        if s[-1] <= 1e-3 * s[0]:
            return None  # squared singular values this far apart are lost in float32
        residual = (coupling @ ritz_vectors[-width:]).norm(dim=0) / s
        if residual.norm() <= tolerance * s.norm():
            u, v = (product(rows[:size].mT, ritz_vectors) for rows in (y, q))
            return SVD(u / s, s, v)
        check = size + max(width, size // 8 // width * width)
    return None


def polar_factor(m: Tensor, *, exact: bool = False) -> Tensor:
    """The orthonormal columns nearest to `m`: P Q^T for M = P S Q^T.

    Unlike QR it does not depend on the order of the columns beyond permuting them. Columns that depend linearly on
    others (the same task twice) get the partial isometry, P and Q taken over non-zero singular values only: completing
    them by arbitrary directions would add noise to the merge.

    Args:
        m: m x p with p <= m, columns of about unit length.
        exact: through the SVD of M instead of the eigenvectors of M^T M.

    Returns:
        m x p; U^T U = I unless columns were dependent, then a projector of the numerical rank.
    """
    rows, columns = m.shape
    if columns > rows:
        raise ValueError(f"{columns} columns cannot be orthonormal in dimension {rows}: cap the rank per task first")
    if exact:
        p, s, qh = torch.linalg.svd(m, full_matrices=False)
        kept = s > _DEPENDENT * s[0]
        return p[:, kept] @ qh[kept]
    gram = product(m.mT, m)
    values, q = torch.linalg.eigh(gram)
    if float(values[0]) <= _WELL_CONDITIONED * float(values[-1]):
        return _polar_factor_of_ill_conditioned(m, values, q)
    root = product(q * values.rsqrt(), q.mT)
    # a Newton-Schulz step on the p x p side takes the root's own rounding back to working precision
    return product(m, 1.5 * root - 0.5 * product(root, product(product(root, gram), root)))


def _polar_factor_of_ill_conditioned(m: Tensor, values: Tensor, q: Tensor) -> Tensor:
    """From the eigenvalues and eigenvectors of M^T M, corrected for what squaring has lost.

    M Q = P S with P^T P = I + F; to first order in F the polar factor is P (I - C) Q^T, C_ij = F_ij s_i / (s_i + s_j).
    """
    image = product(m, q)
    if lost := int((values < _LOST * values[-1]).sum()):
        # these directions are mixed up among each other, beyond first order: they are decomposed without squaring
        p, s, turn = torch.linalg.svd(image[:, :lost].double(), full_matrices=False)
        image[:, :lost], q[:, :lost] = p * s, q[:, :lost] @ turn.mT.to(q)
    s = image.norm(dim=0)
    kept = s > _DEPENDENT * s.max()
    s, q = s[kept], q[:, kept]
    p = image[:, kept] / s
    overlap = product(p.mT, p).fill_diagonal_(0.0)
    if float(overlap.abs().max()) > _FIRST_ORDER:
        return polar_factor(m, exact=True)
    u = product(p - product(p, overlap * (s[:, None] / (s[:, None] + s))), q.mT)
    return 1.5 * u - 0.5 * product(u, product(u.mT, u))  # what the second order leaves of U^T U, by Newton-Schulz


_WELL_CONDITIONED = 1e-2
"""Smallest over largest eigenvalue of M^T M above which float32 is enough to take its inverse root."""

_LOST = 1e-4
"""Eigenvalue of M^T M, relative to the largest, below which float32 has lost its vector."""

_FIRST_ORDER = 0.02
"""Cosine of two of the P up to which the first order is enough: what it leaves is the square of that."""

_DEPENDENT = 1e-4
"""Relative singular value below which unit columns count as dependent; float32 bases are good to about this."""


class Solution(NamedTuple):
    """What `conjugate_gradient` found: x, the steps taken, ||r|| relative to the start, and a condition estimate."""

    x: Tensor
    steps: int
    residual: float
    condition: float


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    residual: Tensor,
    x: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor] = lambda r: r,
    tolerance: float = 1e-4,
    max_steps: int = 100,
) -> Solution:
    """Preconditioned conjugate gradients for H x = b, started at `x` with `residual` = b - H x already known.

    Stops when the preconditioned residual, the estimated error of x, is below `tolerance` times x itself. The
    condition number is that of the preconditioned operator, from the Lanczos tridiagonal matrix of the steps taken.
    """
    r = residual
    z = precondition(r)
    direction = z
    rho = torch.dot(r, z)
    first = r.norm().clamp_min(torch.finfo(r.dtype).tiny)
    alphas: list[float] = []
    betas: list[float] = []
    steps = 0
    while steps < max_steps and float(z.norm()) > tolerance * float(x.norm()) and float(rho) > 0:
        image = apply(direction)
        step = rho / torch.dot(direction, image)
        x = x + step * direction
        r = r - step * image
        z = precondition(r)
        following = torch.dot(r, z)
        beta = following / rho
        direction = z + beta * direction
        rho = following
        steps += 1
        alphas.append(float(step))
        betas.append(float(beta))
    return Solution(x, steps, float(r.norm() / first), _lanczos_condition(alphas, betas))


def _lanczos_condition(alphas: list[float], betas: list[float]) -> float:
    """Condition number of the tridiagonal matrix that conjugate gradients build (Golub and Van Loan, 11.3)."""
    if not alphas:
        return 1.0
    size = len(alphas)
    tridiagonal = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        tridiagonal[i, i] = 1 / alphas[i] + (betas[i - 1] / alphas[i - 1] if i else 0.0)
        if i:
            off = math.sqrt(max(betas[i - 1], 0.0)) / alphas[i - 1]
            tridiagonal[i, i - 1] = tridiagonal[i - 1, i] = off
    values = torch.linalg.eigvalsh(tridiagonal)
    return float(values[-1] / values[0]) if float(values[0]) > 0 else math.inf


def extreme_eigenvalues(
    apply: Callable[[Tensor], Tensor], start: Tensor, *, tolerance: float = 1e-3, max_steps: int = 80
) -> tuple[float, float]:
    """Smallest and largest eigenvalue of a symmetric operator, by Lanczos' method with full reorthogonalisation.

    Args:
        apply: the operator on vectors of length p.
        start: a vector with a share in every direction, such as a random one.
        tolerance: residual allowed at either end, relative to the largest magnitude.
        max_steps: products with the operator; p of them are exact.

    Returns:
        Both ends of the spectrum.
    """
    size = min(max_steps, start.numel())
    basis = start.new_zeros(size, start.numel())
    tridiagonal = torch.zeros(size, size, dtype=torch.float64)
    following = start / start.norm()
    values = tridiagonal.new_zeros(1)
    for step in range(size):
        basis[step] = following
        known = basis[: step + 1]
        image = apply(following)
        tridiagonal[step, step] = float(torch.dot(image, following))
        for _ in range(2):  # once leaves rounding that grows into copies of eigenvalues already found
            image = image - (known @ image) @ known
        coupling = float(image.norm())
        values, vectors = torch.linalg.eigh(tridiagonal[: step + 1, : step + 1])
        residual = coupling * float(vectors[-1, [0, -1]].abs().max())
        if step + 1 == size or residual <= tolerance * float(values.abs().max()):
            break
        tridiagonal[step, step + 1] = tridiagonal[step + 1, step] = coupling
        following = image / coupling
    return float(values[0]), float(values[-1])
