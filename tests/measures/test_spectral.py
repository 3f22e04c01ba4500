from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from linchain_analysis.measures import spectral

sizes = st.floats(1e-6, 1e6)
spectra = arrays(np.float64, st.integers(1, 12), elements=sizes)


def test_values_computed_by_hand() -> None:
    assert spectral.effective_rank([1.0, 1.0, 1.0, 1.0]) == pytest.approx(4)
    # p = 3/4, 1/4: entropy = 3/4 ln 4/3 + 1/4 ln 4
    assert spectral.effective_rank([3.0, 1.0]) == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    # the same of 9/10, 1/10
    by_hand = math.exp(0.9 * math.log(10 / 9) + 0.1 * math.log(10))
    assert spectral.effective_rank_squared([3.0, 1.0]) == pytest.approx(by_hand)
    assert spectral.stable_rank([2.0, 1.0]) == pytest.approx(1.25)
    assert spectral.frobenius_norm([4.0, 3.0]) == pytest.approx(5)
    assert spectral.spectral_norm([4.0, 3.0]) == 4
    assert spectral.num_directions([3.0, 1.0], share=0.9) == 1
    assert spectral.num_directions([3.0, 1.0], share=0.91) == 2


def test_the_tail_weighs_in_the_effective_rank() -> None:
    """One spike over fifteen values of 0.12 gives about 10.9 of 16, and 1.2 by the stable rank."""
    sigma = [1.0] + [0.12] * 15
    assert spectral.effective_rank(sigma) == pytest.approx(10.9, abs=0.05)
    assert spectral.stable_rank(sigma) == pytest.approx(1 + 15 * 0.12**2)


@given(spectra, sizes)
def test_ranks_do_not_depend_on_size_or_padding(sigma: np.ndarray, size: float) -> None:
    padded = np.concatenate([sigma, np.zeros(3)])
    for measure in (spectral.effective_rank, spectral.effective_rank_squared, spectral.stable_rank):
        rank = measure(sigma)
        assert 1 - 1e-12 <= rank <= len(sigma) * (1 + 1e-12)
        assert measure(sigma * size) == pytest.approx(rank, rel=1e-12)
        assert measure(padded) == pytest.approx(rank, rel=1e-12)
    assert spectral.frobenius_norm(padded * size) == pytest.approx(np.sqrt((sigma**2).sum()) * size, rel=1e-12)


def test_zero_and_non_finite_spectra_have_defined_results() -> None:
    stack = np.array([[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0], [2.0, 0.0]])
    for rank in (spectral.effective_rank, spectral.effective_rank_squared, spectral.stable_rank):
        np.testing.assert_array_equal(rank(stack), [np.nan, np.nan, np.nan, 1.0])
    for norm in (spectral.frobenius_norm, spectral.spectral_norm):
        np.testing.assert_array_equal(norm(stack), [0.0, np.nan, np.nan, 2.0])
    np.testing.assert_array_equal(spectral.num_directions(stack), [np.nan, np.nan, np.nan, 1.0])
    empty = np.zeros((2, 0))
    assert np.isnan(spectral.effective_rank(empty)).all()
    np.testing.assert_array_equal(spectral.frobenius_norm(empty), [0, 0])


def test_squares_neither_overflow_nor_vanish() -> None:
    assert spectral.frobenius_norm([4e200, 3e200]) == pytest.approx(5e200)
    assert spectral.frobenius_norm([4e-200, 3e-200]) == pytest.approx(5e-200)
    assert spectral.stable_rank([2e-200, 1e-200]) == pytest.approx(1.25)


def test_a_broken_matrix_leaves_its_neighbours_alone() -> None:
    stack = np.stack([np.diag([3.0, 2.0]), np.full((2, 2), np.nan), np.diag([1.0, 5.0])])
    np.testing.assert_allclose(spectral.spectrum(stack), [[3, 2], [np.nan, np.nan], [5, 1]])
