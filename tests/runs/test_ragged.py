"""Blocks of spectra against one row at a time."""

from __future__ import annotations

import numpy as np
import pytest

from linchain_analysis.measures.spectral import effective_rank, frobenius_norm
from linchain_analysis.runs import ragged
from linchain_analysis.runs.ragged import blocks_of, measure_ragged

FORMULAS = {"effective_rank": effective_rank, "norm": frobenius_norm}


@pytest.mark.parametrize("num_rows", [0, 1, 2, ragged._BLOCK, ragged._BLOCK + 1, 3 * ragged._BLOCK - 1])
@pytest.mark.parametrize("longest", [(4, 4), (0, 5), (1, 3)])
def test_rows_are_measured_as_one_by_one(num_rows: int, longest: tuple[int, int]) -> None:
    rng = np.random.default_rng(num_rows)
    lengths = rng.integers(longest[0], longest[1] + 1, num_rows)
    rows = [rng.random(length).astype(np.float32) for length in lengths]
    flat = np.concatenate([*rows, np.zeros(0, np.float32)])
    found = measure_ragged(flat, lengths, FORMULAS)
    for name, formula in FORMULAS.items():
        # Sums of up to five numbers in another order.
        np.testing.assert_allclose(found[name], [formula(row[None])[0] for row in rows], rtol=1e-14)


def test_a_row_of_nan_does_not_touch_its_neighbours() -> None:
    found = measure_ragged(np.array([1.0, 1.0, np.nan, 1.0, 3.0]), np.array([2, 2, 1]), FORMULAS)
    np.testing.assert_allclose(found["effective_rank"], [2.0, np.nan, 1.0], rtol=1e-14)
    np.testing.assert_allclose(found["norm"], [2**0.5, np.nan, 3.0], rtol=1e-14)


def test_blocks_are_padded_in_float64() -> None:
    ((rows, block),) = blocks_of(np.array([1, 2, 3], dtype=np.float32), np.array([2, 0, 1]))
    assert (rows, block.dtype) == (slice(0, 3), np.float64)
    np.testing.assert_array_equal(block, [[1, 2], [0, 0], [3, 0]])
