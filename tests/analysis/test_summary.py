import numpy as np
import pandas as pd
import pytest
from synthetic_runs import FrameRuns, comparison, rows

from linchain_analysis.analysis.summary import _cut_to_range, summarise_methods
from linchain_analysis.errors import InputError

COLUMNS = ["method", "measure", "mean", "low", "high", "num_seeds", "interval"]


def _runs(**tables: list[pd.DataFrame]) -> FrameRuns:
    return FrameRuns(**{name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()})


def _cell(runs: FrameRuns, measure: str, method: str = "lora-16") -> pd.Series:
    table = summarise_methods(runs).set_index(["method", "measure"])
    return table.loc[(method, measure)]


def test_methods_and_measures_stand_in_order() -> None:
    table = summarise_methods(comparison(num_seeds=2, num_steps=5))
    assert list(table.columns[:7]) == COLUMNS
    assert list(table["method"].unique()) == ["lora-16", "moslora-16", "linchain-2-8", "linchain-3-16"]
    assert list(table["measure"][:3]) == ["final_loss", "accuracy", "final_effective_rank"]
    assert len(table) == 12


@pytest.mark.parametrize(("num_steps", "last"), [(1, 1), (10, 1), (11, 2), (30, 3)])
def test_final_loss_is_the_mean_of_the_last_tenth_of_steps(num_steps: int, last: int) -> None:
    loss = np.arange(num_steps, dtype=float) ** 2
    steps = np.arange(1, num_steps + 1)
    order = np.random.default_rng(0).permutation(num_steps)  # rows need not be sorted
    runs = _runs(steps=[rows("lora-16", 0, {"step": steps[order], "loss": loss[order]})])
    assert _cell(runs, "final_loss")["mean"] == pytest.approx(loss[-last:].mean(), rel=1e-14)


def test_a_diverged_run_stays_in_and_is_counted() -> None:
    runs = _runs(steps=[rows("lora-16", seed, {"step": [1], "loss": [x]}) for seed, x in enumerate([1.0, np.nan])])
    cell = _cell(runs, "final_loss")
    assert (cell["num_seeds"], cell["num_finite"]) == (2, 1)
    assert np.isnan([cell["mean"], cell["low"], cell["high"]]).all()


def test_accuracy_is_the_last_after_training_began() -> None:
    def evals(seed: int, values: dict[int, float], split: str = "eval") -> pd.DataFrame:
        table = {"step": list(values), "split": split, "metric": "accuracy", "value": list(values.values())}
        return rows("lora-16", seed, table)

    runs = _runs(
        evals=[
            evals(0, {0: 0.1, 50: 0.9, 100: 0.5}),
            evals(1, {0: 0.1, 100: 0.7}),
            evals(2, {0: 0.1}),  # ended before an evaluation
            evals(0, {100: 0.0}).assign(metric="loss"),
        ]
    )
    cell = _cell(runs, "accuracy")
    assert (cell["mean"], cell["num_seeds"]) == (pytest.approx(0.6), 2)
    both = _runs(evals=[evals(0, {100: 0.5}), evals(0, {100: 0.25}, "test")])
    assert _cell(both, "accuracy")["mean"] == 0.25


def test_final_effective_rank_leaves_out_modules_without_a_rank() -> None:
    spectra = [[9.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    table = {"step": [1, 2, 2, 2], "module": ["p", "p", "q", "frozen"], "spectrum": spectra}
    runs = _runs(modules=[rows("lora-16", 0, table)])
    # At step 2: ranks 2 and 1; the frozen module has delta = 0.
    assert _cell(runs, "final_effective_rank")["mean"] == pytest.approx(1.5, rel=1e-12)


def test_a_non_finite_spectrum_is_not_left_out() -> None:
    table = {"step": [1, 1], "module": ["p", "q"], "spectrum": [[1.0, 1.0], [np.nan, np.nan]]}
    cell = _cell(_runs(modules=[rows("lora-16", 0, table)]), "final_effective_rank")
    assert np.isnan(cell["mean"])
    assert cell["num_finite"] == 0


def test_problems_and_learning_rates_have_rows_of_their_own() -> None:
    steps = [
        rows("lora-16", 0, {"step": [1], "loss": [1.0]}, rate=1e-3),
        rows("lora-16", 0, {"step": [1], "loss": [2.0]}, rate=1e-2),
        rows("lora-16", 0, {"step": [1], "loss": [3.0]}, problem="shear"),
    ]
    table = summarise_methods(_runs(steps=steps))
    found = table[["problem", "base_learning_rate", "mean"]].to_numpy().tolist()
    assert found == [["shear", 1e-3, 3.0], ["sums", 1e-3, 1.0], ["sums", 1e-2, 2.0]]


def test_the_same_seed_twice_is_refused() -> None:
    steps = [rows("lora-16", 7, {"step": [1], "loss": [1.0]}).assign(run=name) for name in ("a", "b")]
    with pytest.raises(InputError, match="seeds 7/7: a, b"):
        summarise_methods(_runs(steps=steps))


def test_intervals_stay_in_the_range_of_their_measure_and_say_when_they_were_cut() -> None:
    values = pd.DataFrame({"measure": ["final_loss", "accuracy", "final_effective_rank"], "value": [0.1, 0.9, 2.0]})
    table = values.assign(low=[-0.5, 0.6, 0.2], high=[0.7, 1.2, 3.8], interval="95 % t interval over seeds")
    cut = _cut_to_range(table, values)
    assert cut["low"].tolist() == [0.0, 0.6, 1.0]
    assert cut["high"].tolist() == [0.7, 1.0, 3.8]
    assert cut["interval"].str.endswith("cut to the range of the measure").all()
    inside = _cut_to_range(table.assign(low=[0.1, 0.6, 1.5], high=[0.7, 0.9, 3.8]), values)
    assert (inside["interval"] == "95 % t interval over seeds").all()
    negative = values.assign(value=[-0.1, 0.9, 2.0])
    assert _cut_to_range(table, negative)["low"].iloc[0] == -0.5
