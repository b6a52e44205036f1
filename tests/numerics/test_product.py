"""Large products against float64, whichever library multiplies."""

from __future__ import annotations

import pytest
import torch

from hf_epimer.numerics.product import add_symmetric, mirror, product
from hf_epimer.numerics.regression import gram


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n", "p"), [(3, 200, 100), (100, 70, 130), (640, 96, 72)])
def test_a_product_is_right_however_its_operands_lie(m: int, n: int, p: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((m, n), (n, p)))
    expected = a.double() @ b.double()
    for left in (a, a.mT.contiguous().mT, torch.cat([a, a], dim=1)[:, :n]):
        for right in (b, b.mT.contiguous().mT):
            found = product(left, right)
            assert found.dtype == dtype and found.shape == (m, p)
            assert (found - expected).norm() < 1e-6 * expected.norm()


def test_a_sum_of_symmetric_products_is_complete_once_mirrored() -> None:
    generator = torch.Generator().manual_seed(0)
    total, expected = torch.zeros(1100, 1100), torch.zeros(1100, 1100, dtype=torch.float64)
    for scale in (0.5, 2.0):
        d = torch.randn(70, 1100, generator=generator)
        add_symmetric(total, d.mT, d, scale)
        expected += scale * d.double().mT @ d.double()
    mirror(total)
    assert torch.allclose(total, total.mT, atol=1e-4)
    assert (total - expected).norm() < 1e-6 * expected.norm()
    weights = torch.rand(70, 1, generator=generator)
    assert torch.allclose(gram(d, weights * d), d.mT @ (weights * d), atol=1e-4)
