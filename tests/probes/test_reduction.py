from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linchain_analysis.probes import reduction


def random_rows(k: int, w: int, d: int, condition: float, seed: int) -> torch.Tensor:
    """Rows whose singular values fall geometrically from 1 to 1/condition."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(k, w, w, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(k, d, w, generator=generator, dtype=torch.float64)).Q
    sigma = torch.logspace(0, -np.log10(condition), w, dtype=torch.float64)
    return left * sigma @ right.mT


@pytest.mark.parametrize("reduce", [reduction.triangular_factor, reduction._cholesky_twice])
@settings(max_examples=30, deadline=None)
@given(w=st.integers(1, 9), extra=st.integers(0, 30), log_condition=st.floats(0, 12), seed=st.integers(0, 1000))
def test_singular_values_survive(reduce, w: int, extra: int, log_condition: float, seed: int) -> None:
    rows = random_rows(3, w, w + extra, 10**log_condition, seed)
    factor = reduce(rows)
    expected = np.linalg.svd(rows.numpy(), compute_uv=False)
    np.testing.assert_allclose(np.linalg.svd(factor.numpy(), compute_uv=False), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("reduce", [reduction.triangular_factor, reduction._cholesky_twice])
def test_zero_deficient_and_broken_matrices_stand_beside_good_ones(reduce) -> None:
    rows = torch.randn(4, 6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[1] = 0
    rows[2, 3:] = 0.1 * rows[2, :3]  # an update that is a multiple of its factor
    rows[3, 2, 2] = float("nan")
    factor = reduce(rows)
    for i in range(3):
        torch.testing.assert_close(factor[i].T @ factor[i], rows[i] @ rows[i].T, rtol=0, atol=1e-12)
    assert factor[3].isnan().any()


def test_a_factor_wider_than_long_keeps_its_gram_matrix() -> None:
    rows = torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factor = reduction.triangular_factor(rows)
    assert factor.shape == (2, 5, 8)
    torch.testing.assert_close(factor.mT @ factor, rows @ rows.mT, rtol=0, atol=1e-13)
