from __future__ import annotations

import itertools

import numpy as np
import pytest

from linchain_analysis.measures.chains import chain_core, update_core


def triangular(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.qr(matrix)[1]


def product(factors: list[np.ndarray]) -> np.ndarray:
    return np.linalg.multi_dot(factors) if len(factors) > 1 else factors[0]


@pytest.mark.parametrize("widths", [(4,), (4, 4), (3, 5, 6, 3), (8, 16, 8), (2,) * 9])
@pytest.mark.parametrize("step", [1.0, 1e-3, 1e-6])
def test_cores_have_the_singular_values_of_the_products(widths: tuple[int, ...], step: float) -> None:
    rng = np.random.default_rng(0)
    sizes = (30, *widths, 20)
    before = [rng.standard_normal(pair) for pair in itertools.pairwise(sizes)]
    after = [factor + step * rng.standard_normal(factor.shape) for factor in before]
    core = chain_core(triangular(before[0])[None], [f[None] for f in before[1:-1]], triangular(before[-1].T)[None])
    expected = np.linalg.svd(product(before), compute_uv=False)[: min(core.shape[1:])]
    np.testing.assert_allclose(np.linalg.svd(core[0], compute_uv=False), expected, rtol=0, atol=1e-13 * expected[0])

    left = triangular(np.hstack([before[0], after[0] - before[0]]))
    right = triangular(np.vstack([after[-1] - before[-1], after[-1]]).T)
    change = update_core(left[None], [f[None] for f in before[1:-1]], [f[None] for f in after[1:-1]], right[None])
    # The reference subtracts two products, so it is good to rounding of the products and not of their difference.
    dense = product(after) - product(before)
    expected = np.linalg.svd(dense, compute_uv=False)[: min(change.shape[1:])]
    rounding = 1e-13 * np.linalg.norm(product(before))
    np.testing.assert_allclose(np.linalg.svd(change[0], compute_uv=False), expected, rtol=0, atol=rounding)
