from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from chain_cores import Shape, every_shape, random_chain, small_cores

from linchain_analysis.measures.relative_size import measure_relative_size

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@every_shape
@pytest.mark.parametrize("moved", [None, 0.5])
def test_both_columns_against_the_full_matrices(shape: Shape, moved: float | None) -> None:
    rng = np.random.default_rng(0)
    chains = [random_chain(rng, shape, moved=moved) for _ in range(2)]
    base = np.array([3.0, 0.02])
    values = measure_relative_size(small_cores(chains, base_norm=base)[0])
    for j, chain in enumerate(chains):
        assert values["relative_delta"][j] == pytest.approx(np.linalg.norm(chain.delta) / base[j], rel=1e-10)
        assert values["relative_update"][j] == pytest.approx(np.linalg.norm(chain.update) / base[j], rel=1e-10)


def test_a_base_that_is_zero_or_cannot_be_read_has_no_ratio() -> None:
    chains = [random_chain(np.random.default_rng(1), (6, (2,), 5)) for _ in range(5)]
    cores, _ = small_cores(chains, base_norm=np.array([0.0, np.nan, np.inf, 1e-300, 2.0]))
    for value in measure_relative_size(cores).values():
        np.testing.assert_array_equal(np.isnan(value), [True, True, True, False, False])
    for value in measure_relative_size(replace(cores, base_norm=None)).values():
        assert np.isnan(value).all()


def test_no_delta_and_no_update_have_size_zero() -> None:
    chain = random_chain(np.random.default_rng(2), (6, (2,), 5), step=0)
    chain.before[-1][:] = 0
    for value in measure_relative_size(small_cores([chain], base_norm=np.ones(1))[0]).values():
        np.testing.assert_array_equal(value, [0])
