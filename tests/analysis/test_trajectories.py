import math

import numpy as np
import pandas as pd
import pytest
from synthetic_runs import comparison, rows

from linchain_analysis.analysis.caveats import list_caveats
from linchain_analysis.analysis.trajectories import average_modules, choose_window, smooth, trajectories
from linchain_analysis.errors import InputError

# Quantiles of the t distribution in closed form: p = 0.975 with 1 and 2 degrees of freedom.
T1 = math.tan(math.pi * (0.975 - 0.5))
T2 = (2 * 0.975 - 1) / math.sqrt(2 * 0.975 * 0.025)


def _losses(*runs: dict[int, float], method: str = "lora-16") -> pd.DataFrame:
    return pd.concat(
        [rows(method, seed, {"step": list(run), "loss": list(run.values())}) for seed, run in enumerate(runs)]
    )


def test_modules_are_averaged_within_a_run_and_seeds_between_runs() -> None:
    frame = pd.concat(
        [
            rows("lora-16", 0, {"step": [1, 1], "module": ["p", "q"], "x": [1.0, 3.0]}),  # mean 2
            rows("lora-16", 1, {"step": [1, 1], "module": ["p", "q"], "x": [2.0, 6.0]}),  # mean 4
        ]
    )
    (row,) = trajectories(frame, "x").itertuples()
    # Means 2 and 4: s = √2, half width t(0.975, 1) · √2/√2.
    assert (row.step, row.mean, row.num_seeds) == (1, 3.0, 2)
    assert row.high == pytest.approx(3 + T1, rel=1e-12)
    assert row.low == pytest.approx(3 - T1, rel=1e-12)


def test_a_non_finite_module_makes_the_runs_mean_nan() -> None:
    frame = rows("lora-16", 0, {"step": [1, 1, 2, 2], "x": [1.0, np.inf, 1.0, 3.0]})
    np.testing.assert_array_equal(average_modules(frame, "x")["x"], [np.nan, 2.0])


def test_what_is_kept_apart_is_not_averaged() -> None:
    frame = rows("lora-16", 0, {"step": [1, 1], "factor": ["A", "B"], "x": [1.0, 3.0]})
    table = trajectories(frame, "x", by=["factor"])
    assert dict(zip(table["factor"], table["mean"], strict=True)) == {"A": 1.0, "B": 3.0}


def test_smoothing_looks_back_only() -> None:
    np.testing.assert_allclose(smooth(np.array([4.0, 2.0, 6.0, 0.0]), 2), [4.0, 3.0, 4.0, 3.0], rtol=1e-15)


def test_smoothing_keeps_a_gap_for_its_window() -> None:
    found = smooth(np.array([1.0, np.nan, 1.0, np.inf, 1.0, 1.0, 1.0]), 2)
    np.testing.assert_array_equal(found, [1.0, np.nan, np.nan, np.nan, np.nan, 1.0, 1.0])


def test_logarithmic_smoothing_is_geometric_and_leaves_zeros_out() -> None:
    found = smooth(np.array([0.0, 1.0, 100.0, np.nan, 4.0, 4.0]), 2, "log")
    np.testing.assert_allclose(found, [0.0, 1.0, 10.0, np.nan, np.nan, 4.0], rtol=1e-14)


def test_runs_are_smoothed_before_seeds_are_averaged() -> None:
    table = trajectories(_losses({1: 0.0, 2: 2.0}, {1: 4.0, 2: 8.0}), "loss", window=2)
    np.testing.assert_allclose(table["mean"], [2.0, 3.5])  # (0+4)/2; (1+6)/2
    assert set(table["window"]) == {2}


def test_different_recorded_steps_meet_by_interpolation_inside_the_common_range() -> None:
    table = trajectories(_losses({1: 0.0, 3: 2.0, 5: 4.0}, {2: 10.0, 3: 20.0, 6: 50.0}), "loss")
    # Common range 2 … 5; union of steps there 2, 3, 5. First run: 1, 2, 4; second: 10, 20, 40.
    assert list(table["step"]) == [2, 3, 5]
    np.testing.assert_allclose(table["mean"], [5.5, 11.0, 22.0], rtol=1e-15)


def test_a_curve_ends_where_its_shortest_run_ends_and_says_so() -> None:
    frame = _losses({1: 1.0, 2: 1.0}, {1: 3.0, 2: 3.0, 3: 100.0})
    table = trajectories(frame, "loss")
    assert list(table["step"]) == [1, 2]
    assert list(table["num_seeds"]) == [2, 2]
    (sentence,) = list_caveats(frame, table)
    assert sentence.startswith(
        "lora-16 is drawn up to step 2, where its shortest run (sums/lora-16_lr0.001_seed0) ends"
    )
    assert sentence.endswith("others go to 3.")


def test_a_gap_does_not_spread_to_recorded_neighbours() -> None:
    table = trajectories(_losses({1: 1.0, 3: np.nan, 5: 5.0}, {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}), "loss")
    np.testing.assert_array_equal(table["mean"], [1.0, np.nan, np.nan, np.nan, 3.0])
    np.testing.assert_array_equal(table["num_finite"], [2, 1, 1, 1, 2])


def test_a_diverged_run_breaks_the_curve_and_is_named() -> None:
    frame = _losses({1: 1.0, 2: np.inf}, {1: 3.0, 2: 3.0})
    table = trajectories(frame, "loss")
    np.testing.assert_array_equal(table["mean"], [2.0, np.nan])
    assert list_caveats(frame, table) == ["lora-16: NaN or Inf in 1 of 2 runs, from step 2; its curve breaks there."]


def test_a_run_that_knows_no_method_is_unnamed() -> None:
    frame = _losses({1: 1.0}, {1: 1.0, 2: 2.0}).assign(method=None)
    table = trajectories(frame, "loss")
    assert list(table["method"]) == ["unnamed"]
    assert list_caveats(frame, table)[0].startswith("unnamed is drawn up to step 1")


def test_learning_rates_are_never_averaged_together() -> None:
    frame = pd.concat([rows("lora-16", 0, {"step": [1], "loss": [r]}, rate=r) for r in (1e-3, 1e-2)])
    table = trajectories(frame, "loss")
    assert list(table["base_learning_rate"]) == list(table["mean"]) == [1e-3, 1e-2]


def test_a_repeated_seed_is_refused() -> None:
    frame = pd.concat([_losses({1: 1.0}), _losses({1: 1.0}).assign(run="again")])
    with pytest.raises(InputError, match="again"):
        trajectories(frame, "loss")


def test_an_empty_frame_gives_an_empty_table_with_all_columns() -> None:
    table = trajectories(_losses({1: 1.0}).iloc[:0], "loss")
    assert table.empty
    assert {"method", "step", "mean", "low", "high", "num_seeds", "num_finite", "interval", "window"} <= set(table)


def test_a_whole_comparison_equals_a_slow_twin() -> None:
    frame = comparison(num_steps=12).read("factors", columns=["step", "module", "factor", "update_norm"])
    table = trajectories(frame, "update_norm", by=["factor"]).set_index(["method", "factor", "step"])
    for (method, factor, step), cell in frame.groupby(["method", "factor", "step"]):
        by_seed = [run["update_norm"].sum() / len(run) for _, run in cell.groupby("init_seed")]
        found = table.loc[(method, factor, step)]
        assert found["mean"] == pytest.approx(sum(by_seed) / len(by_seed), rel=1e-12)
        assert found["high"] - found["mean"] == pytest.approx(T2 * np.std(by_seed, ddof=1) / 3**0.5, rel=1e-9)


@pytest.mark.parametrize(("num_steps", "window"), [(0, 1), (19, 1), (40, 2), (200, 10)])
def test_the_window_is_a_twentieth(num_steps: int, window: int) -> None:
    assert choose_window(num_steps) == window
