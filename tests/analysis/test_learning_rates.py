"""The choice of a learning rate, the width of the choice, and one rate for all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import pytest
from synthetic_runs import FrameRuns, rows

from linchain_analysis.analysis.learning_rates import (
    RULE,
    at_rates,
    best_losses_at,
    choose_common_rate,
    choose_loss_window,
    choose_rates,
    find_sweeps,
    losses_at,
    measure_rates,
    tune,
)
from linchain_analysis.analysis.levels import choose_level
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
    # Fewer steps, although the loss ends higher.
    fast = choose({"lora-8": {0.1: {0: reaching(4, end=0.1)}, 0.2: {0: reaching(2, end=0.3)}}}).loc["lora-8"]
    assert (fast["base_learning_rate"], fast["num_tied"]) == (0.2, 0)
    final = choose({"lora-8": {0.1: {0: reaching(2, end=0.3)}, 0.2: {0: reaching(2, end=0.1)}}}).loc["lora-8"]
    assert (final["base_learning_rate"], final["num_tied"], final["edge"]) == (0.2, 1, "largest")
    smaller = choose({"lora-8": {0.2: {0: reaching(2)}, 0.1: {0: reaching(2)}}}).loc["lora-8"]
    assert (smaller["base_learning_rate"], smaller["num_tied"]) == (0.1, 1)


def test_a_rate_of_fewer_seeds_does_not_compete() -> None:
    """One of one seed at 0.4, the rest having failed, against nine of ten: neither chosen nor a part of the grid."""
    nine = {seed: reaching(5 if seed else None) for seed in range(10)}
    eight = {seed: reaching(4 if seed > 1 else None) for seed in range(10)}
    found = choose({"lora-8": {0.1: eight, 0.2: nine, 0.4: {0: reaching(1)}}}).loc["lora-8"]
    assert found[["base_learning_rate", "num_seeds", "num_reached"]].tolist() == [0.2, 10, 9]
    assert (found["edge"], found["window_high"], found["window_open"]) == ("largest", 0.2, True)
    # Of each method by itself: another that has fewer seeds everywhere has a rate all the same.
    few = choose({"lora-8": {0.1: nine}, "moslora-8": {0.1: {0: reaching(2)}, 0.2: {0: reaching(1)}}})
    assert few["num_seeds"].to_dict() == {"lora-8": 10, "moslora-8": 1}
    assert few.loc["moslora-8", "base_learning_rate"] == 0.2
    assert RULE.startswith("the rate, of those run with the most seeds, at which most seeds reach the level, among ")


def test_a_chosen_rate_without_a_run_to_report_is_an_error() -> None:
    there, nowhere = {seed: reaching(2) for seed in range(4)}, {seed: reaching(None) for seed in range(4)}
    methods: dict[str, Runs] = {
        "linchain-1-8": {0.5: there},
        "lora-8": {0.5: nowhere, 1.0: {0: reaching(2), 1: reaching(2)}},
    }
    with pytest.raises(InputError, match="a run of lora-8 at its chosen rate, 1, on sums, got none"):
        tune(FrameRuns(steps=losses(methods)), 0.5, select_on=[0, 1])  # type: ignore[arg-type]


@pytest.mark.parametrize("usable", [(0.1, 0.2), (0.4, 0.8)])
def test_a_window_is_open_at_either_edge(usable: tuple[float, float]) -> None:
    grid = {rate: {0: reaching(2 if rate in usable else None)} for rate in (0.1, 0.2, 0.4, 0.8)}
    found = choose({"lora-8": grid}).loc["lora-8"]
    assert (found["window_low"], found["window_high"], found["window_open"]) == (*usable, True)


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


def test_a_method_without_a_median_at_one_of_the_rates_has_no_say_in_the_steps() -> None:
    """Four of six runs arrive at either rate; moslora-8 has a median at 0.2 alone, and lora-8 is faster at 0.1."""
    methods: dict[str, Runs] = {
        "lora-8": {0.1: {s: reaching(2) for s in range(3)}, 0.2: {s: reaching(3 if s else None) for s in range(3)}},
        "moslora-8": {
            0.1: {s: reaching(None if s else 2) for s in range(3)},
            0.2: {s: reaching(2 if s else None) for s in range(3)},
        },
    }
    assert choose_common_rate(measure_rates(losses(methods), 0.5, "relative_loss")) == 0.1


def test_exact_losses_are_not_averaged() -> None:
    frame = losses({"lora-8": {0.1: {0: reaching(2, length=400)}}})
    noisy = frame.rename(columns={"relative_loss": "loss"})
    assert choose_loss_window(noisy, "loss") > 1
    for column in ("relative_loss", "excess_loss"):
        assert choose_loss_window(frame.rename(columns={"relative_loss": column}), column) == 1
    assert choose_loss_window(noisy.iloc[:0], "loss") == 1


def test_the_level_is_one_that_can_be_reached() -> None:
    frame = losses({"lora-8": {0.1: {0: [1.0, 0.1]}}, "moslora-8": {0.1: {0: [1.0, 0.4]}, 0.2: {0: [1.0, 0.3]}}})
    assert choose_level(frame, "relative_loss") == 0.3
    low = losses({"lora-8": {0.1: {0: [1.0, 1e-4]}}, "moslora-8": {0.1: {0: [1.0, 0.4]}}})
    assert choose_level(low, "relative_loss") == 1e-3
    with pytest.raises(InputError, match="half of the runs stay finite"):
        choose_level(losses({"lora-8": {0.1: {0: [math.nan]}}}), "relative_loss")


def test_the_level_is_below_the_start_though_noise_is_fitted_later() -> None:
    """Labels with noise: the loss on new inputs falls to 0.41 or 0.612, and rises above where it began."""
    lora, chain = [0.9, 0.41, 1.7], [0.9, 0.612, 1.4]
    frame = losses({"lora-8": {0.1: {0: lora}}, "moslora-8": {0.1: {0: chain}, 0.2: {0: [1.0, 0.8, 1.2]}}})
    assert choose_level(frame, "relative_loss") == 0.62  # 0.612 in two digits, rounded up
    rates = measure_rates(frame, 0.62, "relative_loss").set_index(["method", "base_learning_rate"])["median"]
    assert rates.to_dict() == {("lora-8", 0.1): 2.0, ("moslora-8", 0.1): 2.0, ("moslora-8", 0.2): math.inf}


def test_most_seeds_reach_the_level_so_that_there_is_a_median() -> None:
    seeds = {k: [1.0, value] for k, value in enumerate((0.1, 0.2, 0.3, 0.4))}
    level = choose_level(losses({"lora-8": {0.1: seeds}}), "relative_loss")
    assert level == 0.3  # of 0.25, the median of four, two would stay above
    (row,) = measure_rates(losses({"lora-8": {0.1: seeds}}), level, "relative_loss").itertuples()
    assert (row.num_reached, row.median) == (3, 2.0)


def test_methods_that_do_not_learn_do_not_set_the_level() -> None:
    bad = {0.1: {0: [1.2, 1.1]}}
    assert choose_level(losses({"lora-8": bad, "moslora-8": {0.1: {0: [1.0, 0.7]}}}), "relative_loss") == 0.7
    assert choose_level(losses({"lora-8": bad}), "relative_loss") == 0.5  # half of the start, which is 1
    near = losses({"lora-8": {0.1: {0: [1.0, 0.9999]}}})
    assert choose_level(near, "relative_loss") == 0.9999  # in two digits it would be the start
    other = losses({"lora-8": {0.1: {0: [3.0, 3.5]}}}).rename(columns={"relative_loss": "loss"})
    assert choose_level(other, "loss") == 1.5
    zero = losses({"lora-8": {0.1: {0: [0.0, 0.0]}}}).rename(columns={"relative_loss": "excess_loss"})
    assert choose_level(zero, "excess_loss") == 0.0


def test_a_run_that_diverges_later_does_not_set_the_level() -> None:
    frame = losses({"lora-8": {0.1: {0: [0.5, 0.4]}, 0.2: {0: [0.01, math.nan]}}})
    assert choose_level(frame, "relative_loss") == 0.4


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
