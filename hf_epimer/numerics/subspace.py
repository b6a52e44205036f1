"""The tagged basis of one layer (EpiMer eq 10, after TSV-M) and coordinates in it.

    (U_t, s_t, V_t) = top-k triples of D_t;   U = polar([U_1 ... U_T]),  V = polar([V_1 ... V_T])

Atom i is U_i V_i^T, tagged with the task whose SVD gave column i. The atoms are orthonormal in the Frobenius product,
so S = [vec(U_1 V_1^T) ... vec(U_p V_p^T)] satisfies S^T S = I and is never formed: S x = U diag(x) V^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_epimer.numerics.linalg import SVD, polar_factor, truncated_svd
from hf_epimer.numerics.product import has_bfloat16, product

ORTHONORMALITY = 1e-4
"""Largest entry of (U^T U - I) z accepted for random z; of ((U^T U)^2 - U^T U) z where columns are dependent."""

_NEGLIGIBLE = 1e-6
"""Singular values this small relative to the task's largest carry no direction, only rounding."""


@dataclass(frozen=True)
class TaggedBasis:
    """Orthonormal atoms of one layer: `u` m x p, `v` n x p, `s` and `tags` (task of each atom) of length p."""

    u: Tensor
    v: Tensor
    s: Tensor
    tags: Tensor
    rank: int

    @property
    def size(self) -> int:
        """p, the dimension of the subspace."""
        return int(self.s.numel())

    def expand(self, x: Tensor) -> Tensor:
        """S x as a matrix: U diag(x) V^T, m x n."""
        return product(self.u * x, self.v.mT)

    def project(self, matrix: Tensor) -> Tensor:
        """S^T vec(matrix): entry i is U_i^T matrix V_i."""
        return (product(matrix, self.v) * self.u).sum(0)

    def expand_fast(self, x: Tensor) -> Tensor:
        """S x with operands rounded to bfloat16 where the processor multiplies those faster, else as `expand`.

        For sums over all entries of a large layer only: an entry is off by 0.4%, but the roundings are independent, and
        what is summed over m n of them is off by some 1e-4.
        """
        if self._rounded is None:
            return self.expand(x)
        # x must not be rounded itself: that error would be common to a whole atom
        return ((self.u * x).bfloat16() @ self._rounded.mT).float()

    def project_fast(self, matrix: Tensor) -> Tensor:
        """S^T vec(matrix), rounded as in `expand_fast`."""
        if self._rounded is None:
            return self.project(matrix)
        return ((matrix.bfloat16() @ self._rounded).float() * self.u).sum(0)

    @cached_property
    def _rounded(self) -> Tensor | None:
        if self.u.dtype != torch.float32 or min(len(self.u), len(self.v)) < _LARGE or not has_bfloat16(self.u.device):
            return None
        return self.v.bfloat16()


_LARGE = 512
"""Smaller dimension from which on independent roundings average out to about 1e-4."""


def capped_rank(rank: int, shape: tuple[int, int], tasks: int) -> int:
    """min(rank, floor(min(m, n) / T)): more columns than that cannot be orthonormal. 0 where T > min(m, n)."""
    return min(rank, min(shape) // tasks)


def tagged_basis(task_vectors: Tensor, rank: int, *, exact: bool = False, seed: int = 0) -> TaggedBasis | None:
    """The tagged basis of T task vectors (eq 10).

    A task vector that is zero, and directions of a rank-deficient one whose singular value vanishes, bring no atoms.

    Args:
        task_vectors: T x m x n.
        rank: k_l, already capped: rank * T <= min(m, n).
        exact: full decompositions instead of iterative ones.
        seed: of the truncated SVD.

    Returns:
        The basis, or None when every task vector is zero.

    Raises:
        ArithmeticError: the whitened factors are not orthonormal to `ORTHONORMALITY`.
    """
    return whitened_basis(task_triples(task_vectors, rank, exact=exact, seed=seed), rank, exact=exact)


def task_triples(task_vectors: Tensor, rank: int, *, exact: bool = False, seed: int = 0) -> list[SVD]:
    """The top singular triples of every task vector, T x m x n; none of vanishing singular value."""
    found = []
    for task_vector, norm in zip(task_vectors, torch.linalg.vector_norm(task_vectors, dim=(1, 2)), strict=True):
        if not bool(norm):
            m, n = task_vector.shape
            found.append(SVD(task_vector.new_empty(m, 0), task_vector.new_empty(0), task_vector.new_empty(n, 0)))
            continue
        u, s, v = truncated_svd(task_vector, rank, exact=exact, seed=seed)
        kept = int((s > _NEGLIGIBLE * s[0]).sum())
        found.append(SVD(u[:, :kept], s[:kept], v[:, :kept]))
    return found


def whitened_basis(triples: Sequence[SVD], rank: int, *, exact: bool = False) -> TaggedBasis | None:
    """The tagged basis from the leading `rank` triples of every task: one decomposition serves all lower ranks.

    Returns and raises as `tagged_basis`.
    """
    leading = [SVD(u[:, :rank], s[:rank], v[:, :rank]) for u, s, v in triples]
    s = torch.cat([own.s for own in leading])
    if not len(s):
        return None
    tags = [torch.full((len(own.s),), task, device=s.device) for task, own in enumerate(leading)]
    u, v = _whiten([own.u for own in leading], exact), _whiten([own.v for own in leading], exact)
    return TaggedBasis(u, v, s, torch.cat(tags), rank)


def _whiten(factors: list[Tensor], exact: bool) -> Tensor:
    """The polar factor, checked: U^T U must be the identity, or a projector where columns were dependent."""
    whitened = polar_factor(torch.cat(factors, dim=1), exact=exact)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(whitened.shape[1], 8, generator=generator, dtype=whitened.dtype).to(whitened.device)
    once = whitened.mT @ (whitened @ probes)
    if float((once - probes).abs().max()) > ORTHONORMALITY:
        twice = whitened.mT @ (whitened @ once)
        defect = float((twice - once).abs().max())
        if defect > ORTHONORMALITY:
            raise ArithmeticError(f"whitening left an orthonormality defect of {defect:.1e}")
    return whitened


def projected_coordinates(basis: TaggedBasis, task_vectors: Tensor) -> Tensor:
    """c_t = S^T vec(D_t) for every task, T x p: the paper's definition."""
    return torch.stack([basis.project_fast(task_vector) for task_vector in task_vectors])


def tagged_coordinates(basis: TaggedBasis, tasks: int) -> Tensor:
    """The singular values on the task's own block and zero elsewhere, T x p: TSV-M's coordinates."""
    owner = torch.arange(tasks, device=basis.tags.device).unsqueeze(1)
    return torch.where(owner == basis.tags, basis.s, torch.zeros_like(basis.s))
