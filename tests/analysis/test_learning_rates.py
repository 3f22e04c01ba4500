"""The choice of a learning rate, the width of the choice, and one rate for all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import pytest
from synthetic_runs import FrameRuns, rows

from linchain_analysis.analysis.learning_rates import (
    at_rates,
    best_losses_at,
    choose_common_rate,
    choose_level,
    choose_rates,
    find_sweeps,
    losses_at,
    measure_rates,
    tune,
)
from linchain_analysis.errors import InputError

Runs = Mapping[float, Mapping[int, Sequence[float]]]


def losses(methods: Mapping[str, Runs]) -> pd.DataFrame:
    frames = [
        rows(method, seed, {"step": range(1, len(run) + 1), "relative_loss": run}, rate=rate)
        for method, by_rate in methods.items()
        for rate, seeds in by_rate.items()
        for seed, run in seeds.items()
    ]
    return pd.concat(frames, ignore_index=True)


def reaching(step: int | None, length: int = 6, end: float = 0.0) -> list[float]:
    """A loss that is 1 until it falls to `end` at `step`."""
    return [1.0] * length if step is None else [1.0] * (step - 1) + [end] * (length - step + 1)


def choose(methods: Mapping[str, Runs], level: float = 0.5) -> pd.DataFrame:
    return choose_rates(measure_rates(losses(methods), level, "relative_loss")).set_index("method")


def test_most_seeds_come_before_fewest_steps() -> None:
    found = choose({"lora-8": {0.1: {0: reaching(5), 1: reaching(5)}, 0.2: {0: reaching(1), 1: reaching(None)}}}).loc[
        "lora-8"
    ]
    assert (found["base_learning_rate"], found["median"], found["num_reached"]) == (0.1, 5.0, 2)
    assert (found["num_tied"], found["edge"]) == (0, "smallest")


def test_then_fewest_steps_then_the_final_loss_then_the_smaller_rate() -> None:
    steps = choose({"lora-8": {0.1: {0: reaching(3)}, 0.2: {0: reaching(2)}, 0.4: {0: reaching(4)}}}).loc["lora-8"]
    assert (steps["base_learning_rate"], steps["num_tied"], steps["edge"]) == (0.2, 0, "")
    final = choose({"lora-8": {0.1: {0: reaching(2, end=0.3)}, 0.2: {0: reaching(2, end=0.1)}}}).loc["lora-8"]
    assert (final["base_learning_rate"], final["num_tied"], final["edge"]) == (0.2, 1, "largest")
    smaller = choose({"lora-8": {0.2: {0: reaching(2)}, 0.1: {0: reaching(2)}}}).loc["lora-8"]
    assert (smaller["base_learning_rate"], smaller["num_tied"]) == (0.1, 1)


def test_a_method_that_never_gets_there_has_the_rate_of_its_lowest_loss() -> None:
    found = choose({"lora-8": {0.1: {0: [1.0, 0.9]}, 0.2: {0: [1.0, 0.7]}, 0.4: {0: [1.0, math.nan]}}}).loc["lora-8"]
    assert (found["base_learning_rate"], found["num_reached"], found["median"]) == (0.2, 0, math.inf)
    assert math.isnan(found["window_octaves"])


def test_the_window_holds_neighbouring_rates_of_which_more_than_half_of_the_seeds_arrive() -> None:
    steps: dict[float, int | None] = {0.1: None, 0.2: 4, 0.4: 2, 0.8: 3, 1.6: None, 3.2: 5}
    found = choose({"lora-8": {rate: {0: reaching(step)} for rate, step in steps.items()}}).loc["lora-8"]
    assert (found["window_low"], found["window_high"], found["window_octaves"]) == (0.2, 0.8, pytest.approx(2.0))
    assert not found["window_open"]
    open_one = choose({"lora-8": {rate: {0: reaching(2)} for rate in (0.1, 0.2)}}).loc["lora-8"]
    assert open_one["window_open"]
    assert open_one["window_octaves"] == pytest.approx(1.0)


def test_a_grid_of_one_rate_has_no_inside() -> None:
    assert choose({"lora-8": {0.1: {0: reaching(2)}}}).loc["lora-8", "edge"] == "only"


def test_seeds_that_choose_are_not_reported() -> None:
    frame = losses(
        {
            "lora-8": {
                0.1: {0: reaching(2), 1: reaching(6), 2: reaching(6)},
                0.2: {0: reaching(3), 1: reaching(1), 2: reaching(1)},
            }
        }
    )
    runs = FrameRuns(steps=frame)
    (own,) = tune(runs, 0.5, select_on=[0]).itertuples()  # type: ignore[arg-type]
    assert (own.base_learning_rate, own.num_seeds, own.median) == (0.1, 2, 6.0)
    (all_of_them,) = tune(runs, 0.5).itertuples()  # type: ignore[arg-type]
    assert (all_of_them.base_learning_rate, all_of_them.num_seeds, all_of_them.median) == (0.2, 3, 1.0)
    with pytest.raises(InputError, match="seeds: expected seeds of the runs"):
        tune(runs, 0.5, select_on=[7])  # type: ignore[arg-type]


def test_losses_at_a_step_count_what_left_the_numbers_as_infinite() -> None:
    frame = losses(
        {"lora-8": {0.1: {0: [1.0, 0.5, 0.1], 1: [1.0, 0.3, math.nan]}, 0.2: {0: [1.0], 1: [0.5, 0.4, 0.2]}}}
    )
    second = losses_at(frame, "relative_loss", 2).set_index("base_learning_rate")
    assert second.loc[0.1, "median"] == 0.4
    assert second.loc[0.2, "median"] == math.inf  # one of the two runs ended before
    assert losses_at(frame, "relative_loss", 3).set_index("base_learning_rate").loc[0.1, "median"] == math.inf
    assert losses_at(frame, "relative_loss").set_index("base_learning_rate").loc[0.2, "median"] == pytest.approx(0.6)
    assert best_losses_at(frame, "relative_loss", 2)[["base_learning_rate", "median"]].values.tolist() == [[0.1, 0.4]]


def test_the_common_rate_is_that_of_most_runs_of_all_methods() -> None:
    methods: dict[str, Runs] = {
        "lora-8": {0.1: {0: reaching(1)}, 0.2: {0: reaching(1)}, 0.4: {0: reaching(1)}},
        "moslora-8": {0.1: {0: reaching(None)}, 0.2: {0: reaching(3)}},
    }
    assert choose_common_rate(measure_rates(losses(methods), 0.5, "relative_loss")) == 0.2
    apart = {"lora-8": {0.1: {0: reaching(1)}}, "moslora-8": {0.2: {0: reaching(1)}}}
    with pytest.raises(InputError, match="every method was run at"):
        choose_common_rate(measure_rates(losses(apart), 0.5, "relative_loss"))


def test_the_level_is_one_that_can_be_reached() -> None:
    frame = losses({"lora-8": {0.1: {0: [1.0, 0.1]}}, "moslora-8": {0.1: {0: [1.0, 0.4]}, 0.2: {0: [1.0, 0.3]}}})
    assert choose_level(frame, "relative_loss") == 0.3
    low = losses({"lora-8": {0.1: {0: [1.0, 1e-4]}}, "moslora-8": {0.1: {0: [1.0, 0.4]}}})
    assert choose_level(low, "relative_loss") == 1e-3
    with pytest.raises(InputError, match="half of the runs stay finite"):
        choose_level(losses({"lora-8": {0.1: {0: [math.nan]}}}), "relative_loss")


def test_rows_at_chosen_rates_and_sweeps() -> None:
    frame = losses(
        {
            "lora-8": {rate: {0: [1.0]} for rate in (0.1, 0.2, 0.3, 0.4)},
            "moslora-8": {0.1: {0: [1.0]}, math.nan: {0: [1.0]}},
        }
    )
    kept = at_rates(frame, {"lora-8": 0.2, "moslora-8": math.nan})
    assert kept["method"].tolist() == ["lora-8", "moslora-8"]
    assert kept["base_learning_rate"].tolist()[0] == 0.2
    assert find_sweeps(frame) == ["sums"]
    assert find_sweeps(frame[frame["base_learning_rate"] != 0.1]) == []
