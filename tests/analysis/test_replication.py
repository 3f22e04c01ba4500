import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from synthetic_runs import rows

from linchain_analysis.analysis.replication import check_replicates, summarise_over_seeds
from linchain_analysis.errors import InputError

# Quantile 0.975 of the t distribution with 2 degrees of freedom, in closed form.
T2 = (2 * 0.975 - 1) / math.sqrt(2 * 0.975 * 0.025)


def _measured(values: list[float], seeds: list[int | None] | None = None) -> pd.DataFrame:
    seeds = list(range(len(values))) if seeds is None else seeds
    return pd.concat([rows("lora-16", seed, {"value": [value]}) for seed, value in zip(seeds, values, strict=True)])


def test_the_interval_is_the_t_interval_by_hand() -> None:
    # 1, 2, 3: mean 2, s = 1, so ± t(0.975, 2)/√3.
    (row,) = summarise_over_seeds(_measured([1.0, 2.0, 3.0]), "value", ["method"]).itertuples()
    assert row.mean == 2.0
    assert row.high - 2.0 == pytest.approx(T2 / 3**0.5, rel=1e-12)
    assert 2.0 - row.low == pytest.approx(T2 / 3**0.5, rel=1e-12)
    assert (row.num_seeds, row.num_finite, row.interval) == (3, 3, "95 % t interval over seeds")


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12))
def test_the_interval_equals_that_of_scipy(values: list[float]) -> None:
    (row,) = summarise_over_seeds(_measured(values), "value", ["method"]).itertuples()
    twin = stats.ttest_1samp(values, 0.0).confidence_interval(0.95) if np.ptp(values) > 0 else (values[0], values[0])
    # The spread is a difference of numbers up to 1e6, so its rounding is 1e6 · 2⁻⁵² · t, below 1e-8 for t ≤ 12.7.
    np.testing.assert_allclose([row.low, row.high], twin, rtol=1e-9, atol=1e-8)


def test_on_the_logarithmic_scale_the_mean_is_geometric_and_the_interval_positive() -> None:
    (row,) = summarise_over_seeds(_measured([1.0, 10.0, 100.0]), "value", ["method"], "log").itertuples()
    assert row.mean == pytest.approx(10.0, rel=1e-12)
    assert row.low == pytest.approx(10.0 ** (1 - T2 / 3**0.5), rel=1e-12)
    assert row.interval == "95 % t interval of the logarithm over seeds"


def test_a_zero_on_the_logarithmic_scale_has_no_interval() -> None:
    (row,) = summarise_over_seeds(_measured([0.0, 10.0]), "value", ["method"], "log").itertuples()
    assert (row.mean, row.num_finite) == (0.0, 2)
    assert np.isnan([row.low, row.high]).all()


def test_one_seed_has_no_interval() -> None:
    (row,) = summarise_over_seeds(_measured([5.0]), "value", ["method"]).itertuples()
    assert (row.mean, row.num_seeds) == (5.0, 1)
    assert np.isnan([row.low, row.high]).all()


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_a_diverged_run_stays_in(lost: float, scale: str) -> None:
    (row,) = summarise_over_seeds(_measured([1.0, lost, 3.0]), "value", ["method"], scale).itertuples()
    assert (row.num_seeds, row.num_finite) == (3, 2)
    assert np.isnan([row.mean, row.low, row.high]).all()


def test_runs_without_recorded_seeds_are_called_runs() -> None:
    frame = _measured([1.0, 2.0], [None, 0])
    (row,) = summarise_over_seeds(frame, "value", ["method"]).itertuples()
    assert row.interval == "95 % t interval over runs (seeds not recorded)"


def test_two_runs_of_one_seed_are_refused_by_name() -> None:
    frame = _measured([1.0, 2.0, 3.0], [0, 1, 1])
    frame["run"] = ["a", "b", "c"]
    with pytest.raises(InputError, match=r"lora-16 .*, got 2 with seeds 1/1: b, c"):
        check_replicates(frame)


def test_two_runs_of_one_seed_are_refused_where_the_learning_rate_is_not_known() -> None:
    frame = _measured([1.0, 2.0], [4, 4]).assign(run=["a", "b"], base_learning_rate=np.nan)
    with pytest.raises(InputError, match="seeds 4/4: a, b"):
        check_replicates(frame)


def test_equal_seeds_of_different_conditions_and_unknown_seeds_are_no_repetition() -> None:
    frame = pd.concat(
        [
            rows("lora-16", 0, {"value": [1.0]}),
            rows("lora-16", 0, {"value": [1.0]}, rate=1e-2),
            rows("moslora-16", 0, {"value": [1.0]}),
            rows("lora-16", None, {"value": [1.0]}).assign(run="x"),
            rows("lora-16", None, {"value": [1.0]}).assign(run="y"),
        ]
    )
    check_replicates(frame)
