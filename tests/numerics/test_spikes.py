"""What stands out among task vectors, from their singular values alone."""

from __future__ import annotations

import torch

from hf_epimer.numerics.spikes import LEADING, spiked_shares, without_spikes


def test_known_singular_values_give_the_shares_that_cutting_gives() -> None:
    generator = torch.Generator().manual_seed(3)
    task_vectors = torch.randn(4, 24, 30, generator=generator, dtype=torch.float64)
    task_vectors[1] += 1.0  # a direction of rank one
    task_vectors[3] = 0
    _, gone = without_spikes(task_vectors, 1.2, exact=True)
    norms = torch.linalg.matrix_norm(task_vectors)
    spectra = {t: torch.linalg.svdvals(task_vectors[t])[: LEADING + 4 * t] for t in range(3)}
    torch.testing.assert_close(spiked_shares(spectra, norms, 1.2), gone)
    assert gone[1] > 0.2 and gone[0] == gone[3] == 0


def test_one_spectrum_has_nothing_to_be_compared_with() -> None:
    assert not spiked_shares({0: torch.tensor([3.0, 1.0])}, torch.tensor([5.0, 0.0]), 1.2).any()
