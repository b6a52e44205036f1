"""The tagged basis of one layer, for every method that works in it (eq 10)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_epimer.methods.base import Layer
from hf_epimer.methods.report import RankReport

if TYPE_CHECKING:
    from hf_epimer.numerics.subspace import TaggedBasis

USUAL = 1.2
"""How many times the tasks' median a leading singular value may be; what is above it stands out."""


def layer_basis(layer: Layer, rank: int | None) -> tuple[TaggedBasis | None, RankReport | None]:
    """The layer's tagged basis at the capped rank, and what is to be reported of it.

    None for parameters that are not matrices, matrices with fewer rows or columns than there are tasks, and layers
    that no task has changed.
    """
    from hf_epimer.numerics.spikes import spiked_shares
    from hf_epimer.numerics.subspace import capped_rank, tagged_basis

    if not layer.is_matrix:
        return None, None
    shape = (int(layer.base.shape[0]), int(layer.base.shape[1]))
    k = capped_rank(rank or min(shape), shape, layer.tasks)
    basis = layer.basis
    if basis is None and k:
        basis = tagged_basis(layer.task_vectors, k, exact=layer.exact, seed=layer.seed)
    capped = rank is not None and k < rank
    if basis is None:
        return None, RankReport(rank=k, capped=capped, atoms=0)
    spectra = {t: basis.s[basis.tags == t] for t in sorted(set(basis.tags.tolist()))}
    spikes = tuple(spiked_shares(spectra, layer.norms, USUAL).tolist())
    return basis, RankReport(rank=k, capped=capped, atoms=basis.size, spikes=spikes)
