from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from linchain_analysis.measures import ranks
from linchain_analysis.measures.registry import all_measures

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

# Those of delta; the update of delta has the same formulas on a spectrum of its own (last test).
READING = {
    name: found
    for name, found in all_measures().items()
    if found.level == "reading" and found.source != "delta_update_spectrum"
}
RANKS = ("effective_rank_squared", "num_directions", "participation_ratio", "nuclear_rank")


def test_values_computed_by_hand() -> None:
    values = {name: float(READING[name].function(np.array([2.0, 1.0, 0.001]))) for name in READING}
    squares = 4 + 1 + 1e-6
    assert values["participation_ratio"] == pytest.approx(squares**2 / (16 + 1 + 1e-12), rel=1e-14)
    assert values["nuclear_rank"] == pytest.approx(3.001**2 / squares, rel=1e-14)
    assert values["delta_nuclear_norm"] == pytest.approx(3.001, rel=1e-15)
    assert values["numerical_rank_fixed"] == 2  # 0.001 is below 1e-3 · 2
    assert values["num_directions"] == 2  # the first holds 80 %
    p = np.array([4, 1, 1e-6]) / squares
    assert values["effective_rank_squared"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-14)


def test_the_fixed_cut_off_is_a_thousandth() -> None:
    np.testing.assert_array_equal(ranks.numerical_rank_fixed(np.array([[2.0, 0.00201], [2.0, 0.00199]])), [2, 1])


def test_ranks_of_equal_values_are_their_number() -> None:
    for r in range(1, 9):
        for name in ("effective_rank_squared", "participation_ratio", "nuclear_rank", "numerical_rank_fixed"):
            assert READING[name].function(np.full(r, 0.3)) == pytest.approx(r, rel=1e-14)


@pytest.mark.parametrize("name", sorted(READING))
def test_zero_and_broken_spectra(name: str) -> None:
    """Of delta = 0 ranks are NaN, counts above a cut-off and norms 0; broken spectra spoil no others; no warnings."""
    stack = np.array([[2.0, 1.0], [0.0, 0.0], [np.nan, np.nan], [np.nan, 1.0], [np.inf, 1.0], [2.0, 1.0]])
    values = READING[name].function(stack)
    assert values.shape == (6,)
    assert values[0] == values[5] == READING[name].function(stack[0])
    assert np.isnan(values[2:5]).all()
    if name in RANKS:
        assert np.isnan(values[1])
    else:
        assert values[1] == 0
    assert READING[name].function(np.zeros((2, 0))).shape == (2,)
    assert READING[name].function(np.ones((2, 3, 4))).shape == (2, 3)


@pytest.mark.parametrize("name", sorted(READING))
@given(
    sigma=arrays(np.float64, st.integers(1, 8), elements=st.floats(1e-6, 1e6)),
    size=st.sampled_from([1e150, 1e-150, 2.0]),
)
def test_ranks_do_not_depend_on_size_or_padding(name: str, sigma: np.ndarray, size: float) -> None:
    sigma = np.sort(sigma)[::-1]
    function: Callable[[np.ndarray], np.ndarray] = READING[name].function
    value = function(sigma)
    assert function(np.append(sigma, [0.0, 0.0])) == pytest.approx(value, rel=1e-12)
    if name == "delta_nuclear_norm":
        assert function(size * sigma) == pytest.approx(size * value, rel=1e-12)
        assert np.linalg.norm(sigma) * (1 - 1e-12) <= value <= np.linalg.norm(sigma) * np.sqrt(len(sigma)) * (1 + 1e-12)
    else:
        assert 1 - 1e-12 <= value <= len(sigma) * (1 + 1e-12)
        if not name.startswith("num"):  # counts may change where σ is at the cut-off to rounding
            assert function(size * sigma) == pytest.approx(value, rel=1e-12)


def test_the_columns_are_named_for_the_functions() -> None:
    assert ranks.participation_ratio.__name__ == "participation_ratio"
    for name, found in READING.items():
        (column,) = found.columns
        assert (column.name, column.table, column.derived, column.gauge_dependent) == (name, "modules", True, False)
        assert found.source == "spectrum"


def test_ranks_and_norms_of_the_update_are_those_of_its_own_spectrum() -> None:
    sigma = np.array([[3.0, 4.0, 0.0]])[:, [1, 0, 2]]
    found = {name: all_measures()[f"delta_update_{name}"] for name in ("stable_rank", "spectral_norm", "nuclear_norm")}
    assert {one.source for one in found.values()} == {"delta_update_spectrum"}
    values = {name: float(one.function(sigma)[0]) for name, one in found.items()}
    assert values == {"stable_rank": 25 / 16, "spectral_norm": 4.0, "nuclear_norm": 7.0}
