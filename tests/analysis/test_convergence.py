"""Steps to a level with runs that never reach it, and ranks at equal progress."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_runs import FrameRuns, rows

from linchain_analysis.analysis.convergence import find_first_steps, quantile, read_losses, summarise_convergence
from linchain_analysis.analysis.matched_ranks import match_ranks, summarise_matched_ranks
from linchain_analysis.errors import InputError

INF = math.inf


def losses(values: dict[int, list[float]], method: str = "lora-8", rate: float = 1e-3) -> pd.DataFrame:
    frames = [
        rows(method, seed, {"step": range(1, len(run) + 1), "relative_loss": run}, rate=rate)
        for seed, run in values.items()
    ]
    return pd.concat(frames, ignore_index=True)


def test_first_steps_by_hand() -> None:
    frame = losses({0: [1.0, 0.5, 0.1, 0.2], 1: [1.0, 0.9, 0.9, 0.9], 2: [1.0, 0.05, math.nan, math.nan]})
    found = find_first_steps(frame, 0.1, "relative_loss").set_index("init_seed")
    assert found.loc[0, "first_step"] == 3  # at the level counts, and that it rises again does not matter
    assert found["reached"].tolist() == [True, False, False]
    assert found["diverged"].tolist() == [False, False, True]  # at the level before it left the finite numbers
    assert found["first_step"].isna().tolist() == [False, True, True]
    assert found["last_step"].tolist() == [4, 4, 4]


def test_steps_are_those_that_are_recorded_and_not_positions() -> None:
    frame = rows("lora-8", 0, {"step": [10, 20, 30], "relative_loss": [1.0, 0.4, 0.2]})
    assert find_first_steps(frame, 0.5, "relative_loss")["first_step"].tolist() == [20.0]


def test_a_chance_crossing_is_smoothed_away() -> None:
    frame = losses({0: [1.0, 0.1, 1.0, 0.2, 0.2]})
    assert find_first_steps(frame, 0.2, "relative_loss")["first_step"].tolist() == [2.0]
    # 0.2 is the mean of two equal numbers, exactly.
    assert find_first_steps(frame, 0.2, "relative_loss", window=2)["first_step"].tolist() == [5.0]


def test_the_median_counts_runs_that_never_arrive_as_slower_than_all_others() -> None:
    frame = losses({0: [0.0], 1: [1.0, 0.0], 2: [1.0, 1.0, 0.0], 3: [1.0] * 3, 4: [1.0] * 3})
    (row,) = summarise_convergence(find_first_steps(frame, 0.5, "relative_loss")).itertuples()
    assert (row.num_seeds, row.num_reached, row.num_diverged) == (5, 3, 0)
    assert (row.median, row.low, row.high) == (3.0, 2.0, INF)


@pytest.mark.parametrize(("num_never", "median"), [(1, 1.0), (2, INF), (3, INF)])
def test_the_median_is_infinite_unless_more_than_half_arrive(num_never: int, median: float) -> None:
    never = {seed: [1.0, 1.0] for seed in range(num_never)}
    there = {seed: [0.0, 0.0] for seed in range(num_never, 4)}
    (row,) = summarise_convergence(find_first_steps(losses({**never, **there}), 0.5, "relative_loss")).itertuples()
    assert row.median == median


@given(st.lists(st.integers(-1000, 1000).map(float), min_size=1, max_size=12), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_quantiles_of_finite_numbers_are_those_of_numpy(values: list[float], q: float) -> None:
    assert quantile(np.array(values), q) == pytest.approx(np.quantile(values, q), rel=1e-12, abs=1e-12)


def test_quantiles_without_a_number() -> None:
    assert quantile(np.array([1.0, INF]), 0.5) == INF
    assert quantile(np.array([INF, INF]), 0.25) == INF
    assert quantile(np.array([1.0, 1.0, INF]), 0.5) == 1.0
    assert math.isnan(quantile(np.array([]), 0.5))
    assert math.isnan(quantile(np.array([1.0, math.nan]), 0.5))


def test_the_relative_loss_is_read_where_every_run_has_it() -> None:
    assert read_losses(FrameRuns(steps=losses({0: [1.0]})))[1] == "relative_loss"  # type: ignore[arg-type]
    plain = rows("lora-8", 0, {"step": [2, 1], "loss": [0.5, 1.0]})
    frame, column = read_losses(FrameRuns(steps=plain))  # type: ignore[arg-type]
    assert (column, frame["step"].tolist(), frame["loss"].tolist()) == ("loss", [1, 2], [1.0, 0.5])


@pytest.mark.parametrize("level", [math.nan, INF])
def test_a_level_is_a_number(level: float) -> None:
    with pytest.raises(InputError, match="level: expected a finite number"):
        find_first_steps(losses({0: [1.0]}), level, "relative_loss")


def test_copies_of_a_run_are_no_seeds() -> None:
    frame = losses({0: [1.0]})
    twice = pd.concat([frame, frame.assign(run="copy")])
    with pytest.raises(InputError, match="one run of lora-8 for each pair of seeds"):
        summarise_convergence(find_first_steps(twice, 0.5, "relative_loss"))


def test_ranks_at_equal_progress_by_hand() -> None:
    frame = losses({0: [0.9, 0.6, 0.5, 0.1], 1: [0.9, 0.8, 0.7, 0.6]})
    recorded = pd.concat([frame[frame["step"].isin([1, 2, 4])]])
    recorded = recorded.assign(module="map", effective_rank=[4.0, 2.0, 3.0, 2.0, 1.5, 1.0])
    found = match_ranks(frame, recorded, "relative_loss", levels=[0.5, 0.1]).set_index(["init_seed", "moment"])
    values = found["effective_rank"]
    assert values[0, "loss ≤ 0.5"] == 2.5  # at step 3, between 2 at step 2 and 3 at step 4
    assert values[0, "loss ≤ 0.1"] == 3.0
    assert values[0, "smallest"] == 2.0
    assert found["step"][0, "smallest"] == 2
    assert values[0, "at the end"] == 3.0
    assert math.isnan(values[1, "loss ≤ 0.5"])
    summary = summarise_matched_ranks(found.reset_index()).set_index("moment")
    assert summary.loc["loss ≤ 0.5", ["mean", "num_seeds", "num_missing"]].tolist() == [2.5, 1, 1]
    assert summary.loc["smallest", ["mean", "num_seeds", "num_missing"]].tolist() == [1.5, 2, 0]


def test_a_diverged_run_has_no_rank_at_any_moment() -> None:
    frame = losses({0: [0.9, 0.4, math.nan]})
    recorded = frame.assign(module="map", effective_rank=[2.0, 1.0, math.nan])
    assert match_ranks(frame, recorded, "relative_loss", levels=[0.5])["effective_rank"].isna().all()


def test_where_nothing_is_relative_to_the_target_the_excess_is_read() -> None:
    undefined = losses({0: [math.nan, math.nan]}).assign(excess_loss=[0.2, 0.1], loss=[0.5, 0.4])
    frame, column = read_losses(FrameRuns(steps=undefined))  # type: ignore[arg-type]
    assert column == "excess_loss" and frame[column].tolist() == [0.2, 0.1]
    unknown = undefined.assign(excess_loss=math.nan)
    assert read_losses(FrameRuns(steps=unknown))[1] == "loss"  # type: ignore[arg-type]
    partly = undefined.assign(relative_loss=[1.0, math.nan])
    assert read_losses(FrameRuns(steps=partly))[1] == "relative_loss"  # type: ignore[arg-type]
