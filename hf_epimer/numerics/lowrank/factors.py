"""A low-rank matrix by its thin SVD, and the union core: the smallest space in which T of them live without loss.

    low_rank(B, A)   B = Q_B R_B, A^T = Q_A R_A, R_B R_A^T = P S Q^T;   U = Q_B P, V = Q_A Q: never m x n
    union core       U_ref = orth [U_t S_t], V_ref = orth [V_t S_t], D_t = U_ref M_t V_ref^T

(B G, G^{-1} A) has the same thin SVD as (B, A), up to the signs and rotations that a thin SVD leaves open. U_ref and
V_ref are singular vectors of [D_1 .. D_T] and of its transposed counterpart, so they depend neither on G nor on the
order of the tasks; methods that look at single entries may be applied to the M_t, too (Stoica et al., KnOTS, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """U diag(s) V^T: `u` m x r and `v` n x r with orthonormal columns, `s` positive, largest first."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def rank(self) -> int:
        """r; 0 for the zero matrix."""
        return int(self.s.numel())

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return int(self.u.shape[0]), int(self.v.shape[0])

    def dense(self) -> Tensor:
        """The matrix itself, m x n."""
        return (self.u * self.s) @ self.v.mT

    def balanced(self) -> tuple[Tensor, Tensor]:
        """Factors B (m x r) and A (r x n) with B^T B = A A^T."""
        root = self.s.sqrt()
        return self.u * root, (self.v * root).mT

    def truncated(self, rank: int) -> LowRank:
        """The nearest matrix of at most this rank."""
        return LowRank(self.u[:, :rank], self.s[:rank], self.v[:, :rank])

    def scaled(self, factor: float) -> LowRank:
        """A multiple; 0 has rank 0."""
        if not factor:
            return self.truncated(0)
        return LowRank(self.u if factor > 0 else -self.u, self.s * abs(factor), self.v)


@dataclass(frozen=True)
class LowRankMean:
    """A mean of low-rank matrices and how it was come by.

    Attributes:
        value: the mean.
        steps: of the iteration, 0 for a closed form.
        residual: of the last step, relative to the mean.
        angle: largest principal angle, in radians, between the column or row space of a point and the mean's.
        unique: whether nothing else minimises the same sum: a gap in the spectrum for `chordal`, points within 45
            degrees of the mean (the radius of convex balls of subspaces) for the others.
        note: what was done where the mean was not unique or not defined; empty if all went well.
    """

    value: LowRank
    steps: int = 0
    residual: float = 0.0
    angle: float = 0.0
    unique: bool = True
    note: str = ""

    def replaced(self, value: LowRank) -> LowRankMean:
        """The same account of another value."""
        return replace(self, value=value)


def low_rank(b: Tensor, a: Tensor) -> LowRank:
    """Thin SVD of B A, numerically zero singular values dropped.

    Args:
        b: m x r.
        a: r x n.
    """
    if not b.shape[1]:
        return LowRank(b, b.new_zeros(0), a.mT)
    left, r_left = torch.linalg.qr(b)
    right, r_right = torch.linalg.qr(a.mT)
    inner = factorize(r_left @ r_right.mT)
    return LowRank(left @ inner.u, inner.s, right @ inner.v)


def factorize(matrix: Tensor) -> LowRank:
    """Thin SVD of a dense matrix, singular values that are rounding dropped."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = int((s > rounding(matrix) * s[0]).sum()) if s.numel() else 0
    return LowRank(u[:, :kept], s[:kept], vh[:kept].mT)


def rounding(matrix: Tensor) -> float:
    """Relative size below which a singular value of this matrix is rounding."""
    return 4 * torch.finfo(matrix.dtype).eps * max(matrix.shape)


@dataclass(frozen=True)
class UnionCore:
    """`left` m x p, `right` n x q (None: as it is, q = n), and the matrices in these coordinates."""

    left: Tensor
    right: Tensor | None
    points: tuple[LowRank, ...]

    def cores(self) -> Tensor:
        """M_t, T x p x q."""
        return torch.stack([point.dense() for point in self.points])

    def expand(self, core: LowRank) -> LowRank:
        """U_ref M V_ref^T for a matrix M in core coordinates."""
        return LowRank(self.left @ core.u, core.s, core.v if self.right is None else self.right @ core.v)


def union_core(points: Sequence[LowRank]) -> UnionCore:
    """The common core of low-rank matrices of one shape, of which at least one is not zero."""
    left, right = _span([x.u * x.s for x in points]), _span([x.v * x.s for x in points])
    inside = tuple(LowRank(left.mT @ x.u, x.s, right.mT @ x.v) for x in points)
    return UnionCore(left, right, inside)


def outputs_core(points: Sequence[LowRank]) -> UnionCore:
    """The same on the side of the outputs only: for metrics of the inputs, which reach beyond any task's directions."""
    left = _span([x.u * x.s for x in points])
    return UnionCore(left, None, tuple(LowRank(left.mT @ x.u, x.s, x.v) for x in points))


def _span(columns: Sequence[Tensor]) -> Tensor:
    """Left singular vectors of [C_1 .. C_T], those of zero singular values left out."""
    q, r = torch.linalg.qr(torch.cat(list(columns), dim=1))
    return q @ factorize(r).u


def largest_angle(points: Sequence[LowRank], mean: LowRank) -> float:
    """Largest principal angle between the spaces of the points and those of the mean, in radians."""
    return max((_angle(a, b) for x in points for a, b in ((x.u, mean.u), (x.v, mean.v))), default=0.0)


def _angle(a: Tensor, b: Tensor) -> float:
    if not a.shape[1] or not b.shape[1]:
        return 0.0
    cosines = torch.linalg.svdvals(a.mT @ b)
    return float(torch.acos(cosines.amin().clamp(max=1.0)))


def padded(tensors: Sequence[Tensor]) -> Tensor:
    """Matrices with columns of zeros appended up to the widest, T x rows x columns."""
    columns = max(x.shape[1] for x in tensors)
    return torch.stack([torch.nn.functional.pad(x, (0, columns - x.shape[1])) for x in tensors])


def aligning(matrices: Tensor) -> Tensor:
    """polar(X) of every matrix in a batch: the rotation O that makes tr(O^T X) largest."""
    p, _, qh = torch.linalg.svd(matrices, full_matrices=False)
    return p @ qh
