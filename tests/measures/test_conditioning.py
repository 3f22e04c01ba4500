from __future__ import annotations

import numpy as np
import pytest
from chain_cores import SHAPES, FullChain, Shape, every_shape, product, random_chain, sides, small_cores
from hypothesis import given, settings
from hypothesis import strategies as st

from linchain_analysis.measures.conditioning import measure_conditioning
from linchain_analysis.measures.cores import Cores

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def condition(matrix: np.ndarray, width: int) -> float:
    sigma = np.linalg.svd(matrix, compute_uv=False)[:width]
    return float(sigma[0] / sigma[-1])


@every_shape
def test_every_column_against_the_full_matrices(shape: Shape) -> None:
    rng = np.random.default_rng(0)
    chains = [random_chain(rng, shape) for _ in range(2)]
    values = measure_conditioning(small_cores(chains)[0])
    dims = [shape[0], *shape[1], shape[2]]
    for j, chain in enumerate(chains):
        whole = condition(product(chain.after), min(dims))
        # σ_min is exact to rounding of σ₁, so the ratio to rounding times itself.
        assert values["chain_condition"][j] == pytest.approx(whole, rel=max(1e-10, 1e-14 * whole))
        for i, (factor, (left, right)) in enumerate(zip(chain.after, sides(chain.after), strict=True)):
            assert values["condition"][j, i] == pytest.approx(np.linalg.cond(factor), rel=1e-10)
            before, behind = condition(left, min(dims[: i + 1])), condition(right, min(dims[i + 1 :]))
            assert values["prefix_condition"][j, i] == pytest.approx(before, rel=max(1e-10, 1e-14 * before))
            assert values["suffix_condition"][j, i] == pytest.approx(behind, rel=max(1e-10, 1e-14 * behind))
    assert (values["prefix_condition"][:, 0] == 1).all()
    assert (values["suffix_condition"][:, -1] == 1).all()


def test_conditions_multiply_along_diagonal_factors() -> None:
    factors = [np.eye(5, 2) @ np.diag([2.0, 1.0]), np.diag([3.0, 1.0]), np.diag([5.0, 1.0]) @ np.eye(2, 4)]
    still = [np.zeros_like(factor) for factor in factors]
    values = measure_conditioning(small_cores([FullChain(factors, still, still)])[0])
    np.testing.assert_allclose(values["condition"], [[2, 3, 5]], rtol=1e-14)
    np.testing.assert_allclose(values["prefix_condition"], [[1, 2, 6]], rtol=1e-14)
    np.testing.assert_allclose(values["suffix_condition"], [[15, 5, 1]], rtol=1e-14)
    np.testing.assert_allclose(values["chain_condition"], [30], rtol=1e-14)


def test_zero_factors_have_no_condition() -> None:
    chain = random_chain(np.random.default_rng(1), SHAPES["n=2"])
    chain.before[-1][:], chain.change[-1][:] = 0, 0
    values = measure_conditioning(small_cores([chain])[0])
    assert np.isnan(values["chain_condition"]).all()
    np.testing.assert_array_equal(np.isnan(values["condition"][0]), [False, False, False, True])
    np.testing.assert_array_equal(np.isnan(values["suffix_condition"][0]), [True, True, True, False])
    assert np.isfinite(values["prefix_condition"]).all()


def test_rank_deficient_factors_are_infinite_or_beyond_what_float64_can_tell() -> None:
    chain = random_chain(np.random.default_rng(2), SHAPES["n=2"], step=0)
    chain.before[1][:, 0] = 0
    values = measure_conditioning(small_cores([chain])[0])
    assert values["condition"][0, 1] == np.inf
    assert values["chain_condition"][0] > 1e15
    assert values["prefix_condition"][0, 2] > 1e15
    assert (values["condition"][0, [0, 2, 3]] < 1e4).all()
    chain.before[1][:, 0] = chain.before[1][:, 1]
    assert measure_conditioning(small_cores([chain])[0])["condition"][0, 1] > 1e15


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(0, 4), st.floats(1e-6, 1e6))
def test_conditions_are_at_least_1_and_do_not_depend_on_size(seed: int, r: int, n: int, size: float) -> None:
    chain = random_chain(np.random.default_rng(seed), (6, (r,) * (n + 1), 5))
    scaled = FullChain([size * f for f in chain.before], [size * f for f in chain.change], chain.gradient)
    values, others = (measure_conditioning(small_cores([each])[0]) for each in (chain, scaled))
    product_of_all = values["condition"].prod()
    assert values["chain_condition"][0] <= product_of_all * (1 + 1e-10)  # square inner factors: cond(AB) ≤ cond cond
    for name, value in values.items():
        assert (value >= 1).all()
        np.testing.assert_allclose(others[name], value, rtol=max(1e-10, 1e-14 * product_of_all))


def test_what_a_gram_matrix_has_lost_of_an_outer_factor_is_not_given_as_a_number() -> None:
    rng = np.random.default_rng(0)
    first, last = rng.standard_normal((1, 12, 4)), rng.standard_normal((1, 4, 9))
    last[:, 3] = last[:, 0] + 1e-9 * rng.standard_normal(9)
    inner = np.diag([1.0, 1.0, 1.0, 1e-8])[None]
    cores = Cores(np.ones(1), (first, inner, last), (0 * first, 0 * inner, 0 * last), (12, 9))
    found = measure_conditioning(cores)
    assert np.isposinf(found["condition"][0, 2])
    assert np.isposinf(found["suffix_condition"][0, :2]).all()
    assert np.isposinf(found["chain_condition"][0])
    assert found["condition"][0, 1] == pytest.approx(1e8)  # an inner factor is known whole
    assert 1e7 < found["prefix_condition"][0, 2] < 1e10
