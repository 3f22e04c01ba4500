from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from chain_cores import SHAPES, FullChain, Shape, every_shape, random_chain, small_cores

from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.numerical_rank import measure_numerical_rank

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

EPS32 = float(np.finfo(np.float32).eps)


@every_shape
@pytest.mark.parametrize("moved", [None, 0.5])
@pytest.mark.parametrize("step", [0.1, 1e-4])
def test_both_columns_against_matrix_rank(shape: Shape, moved: float | None, step: float) -> None:
    rng = np.random.default_rng(0)
    chains = [random_chain(rng, shape, moved=moved, step=step) for _ in range(3)]
    values = measure_numerical_rank(small_cores(chains)[0])
    d_in, widths, d_out = shape
    outer = min(d_in, d_out)
    for j, chain in enumerate(chains):
        # NumPy has the same cut-off, max(rows, columns) · ε · σ₁, with the ε that is asked for.
        assert values["numerical_rank"][j] == np.linalg.matrix_rank(chain.delta, rtol=max(d_in, d_out) * EPS32)
        # The difference of two products holds rounding of size 1e-15/step of itself: far below 12 · 1e-7.
        update = np.linalg.matrix_rank(chain.update, rtol=max(d_in, d_out) * EPS32)
        assert values["delta_update_numerical_rank"][j] == update
        r = min(widths)
        assert values["delta_update_numerical_rank"][j] <= min(2 * r, outer)
        assert values["numerical_rank"][j] <= min(r if moved is None else 2 * r, outer)


def cores_of(sigma: list[float], size: tuple[int, int], epsilon: float) -> Cores:
    a, b = np.eye(6, len(sigma)), np.diag(sigma) @ np.eye(len(sigma), 5)
    chain = FullChain([a, b], [np.zeros_like(a), b], [a, b])
    return replace(small_cores([chain])[0], size=size, epsilon=epsilon)


def test_the_cut_off_grows_with_size_and_epsilon() -> None:
    """σ = 1, 1e-2, 1e-4, 1e-6: the cut-off max(d) · ε counts those above it."""
    sigma = [1.0, 1e-2, 1e-4, 1e-6]
    for size, epsilon, count in [
        ((6, 5), 1e-8, 4),
        ((6, 500), 1e-8, 3),
        ((5000, 5), 1e-8, 3),
        ((5, 500_000), 1e-8, 2),
        ((5, 6), 1e-3, 2),
        ((50, 6), 1e-3, 1),
    ]:
        values = measure_numerical_rank(cores_of(sigma, size, epsilon))
        assert values["numerical_rank"] == values["delta_update_numerical_rank"] == count


@pytest.mark.parametrize(("epsilon", "largest"), [(2.0**-7, 127), (2.0**-10, 1023)], ids=["bfloat16", "float16"])
def test_where_the_cut_off_reaches_the_largest_value_there_is_no_rank(epsilon: float, largest: int) -> None:
    within = measure_numerical_rank(cores_of([1.0, 1.0], (largest, 5), epsilon))
    beyond = measure_numerical_rank(cores_of([1.0, 1.0], (largest + 1, 5), epsilon))
    for name in within:
        assert within[name] == 2
        assert np.isnan(beyond[name])


def test_a_delta_of_zero_has_rank_zero_and_a_broken_one_none() -> None:
    chains = [random_chain(np.random.default_rng(seed), SHAPES["n=1"]) for seed in range(3)]
    chains[0].before[-1][:], chains[0].change[-1][:] = 0, 0
    cores, _ = small_cores(chains)
    cores.change[1][1, 0, 0] = np.nan
    values = measure_numerical_rank(cores)
    np.testing.assert_array_equal(values["numerical_rank"], [0, np.nan, 4])
    np.testing.assert_array_equal(values["delta_update_numerical_rank"][:2], [0, np.nan])
    assert values["delta_update_numerical_rank"][2] == 8


def test_the_first_step_has_the_rank_of_a() -> None:
    """B = 0 and only B moves: the update is A dB, of rank r and not 2 r."""
    chain = random_chain(np.random.default_rng(4), SHAPES["n=0"])
    chain.before[1][:], chain.change[0][:] = 0, 0
    values = measure_numerical_rank(small_cores([chain])[0])
    assert values["numerical_rank"] == values["delta_update_numerical_rank"] == 4
