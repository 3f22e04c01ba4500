"""The table that ends a comparison: final loss, accuracy and final effective rank of each method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from linchain_analysis.analysis.methods import sort_methods
from linchain_analysis.analysis.ranks import measure_ranks
from linchain_analysis.analysis.replication import (
    CONDITION,
    RUN_COLUMNS,
    check_replicates,
    complete_labels,
    summarise_over_seeds,
)
from linchain_analysis.analysis.trajectories import average_modules

if TYPE_CHECKING:
    from linchain_analysis.runs import RunSet

MEASURES = ("final_loss", "accuracy", "final_effective_rank")
FINAL_SHARE = 0.1
_SPLITS = ("test", "eval")
CUT = ", cut to the range of the measure"


def summarise_methods(runs: RunSet) -> pd.DataFrame:
    """Return mean and 95 % t interval over seeds of each measure, for each method.

    - `final_loss`: mean training loss of a run's last tenth of steps (at least one), in the unit of its loss.
    - `accuracy`: of the last evaluation after training began, in 0 … 1; on `test` where there is such a split, else on
      `eval`, else on the first by name.
    - `final_effective_rank`: mean over modules at the last recorded step; modules with delta = 0 have no rank and
      are left out.

    Returns:
        `method measure mean low high num_seeds interval num_finite problem base_learning_rate`, one row for each
        measure that any run of the method has. Diverged runs stay in: where a run's measure is NaN or infinite,
        `num_finite` is below `num_seeds` and mean, low and high are NaN. low and high are NaN with one seed. An
        interval that leaves the range of its measure (0 … 1 for accuracy, from 0 for a loss of which no run is
        negative, from 1 for a rank) is cut to it, which changes nothing about how often it covers the truth.

    Raises:
        InputError: Two runs have the same method, problem, learning rate and seeds.
    """
    parts = {
        "final_loss": find_final_loss(runs),
        "accuracy": find_accuracy(runs),
        "final_effective_rank": find_final_effective_rank(runs),
    }
    values = complete_labels(pd.concat([part.assign(measure=name) for name, part in parts.items()], ignore_index=True))
    check_replicates(values)
    table = _cut_to_range(summarise_over_seeds(values, "value", [*CONDITION, "measure"]), values)
    order = {method: place for place, method in enumerate(sort_methods(table["method"]))}
    rank = table["method"].map(order), table["measure"].map(dict(zip(MEASURES, range(3), strict=True)))
    table = table.iloc[np.lexsort((rank[1], table["base_learning_rate"], rank[0], table["problem"]))]
    columns = ["method", "measure", "mean", "low", "high", "num_seeds", "interval", "num_finite"]
    return table[[*columns, "problem", "base_learning_rate"]].reset_index(drop=True)


def _cut_to_range(table: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
    """Cut intervals to the values that their measure can take, and say so where that changed one."""
    losses = values.loc[values["measure"] == "final_loss", "value"]
    ranges = {
        "final_loss": (-np.inf if (losses < 0).any() else 0.0, np.inf),
        "accuracy": (0.0, 1.0),
        "final_effective_rank": (1.0, np.inf),
    }
    least, most = (table["measure"].map({name: pair[side] for name, pair in ranges.items()}) for side in (0, 1))
    low, high = table["low"].clip(lower=least), table["high"].clip(upper=most)
    cut = (low > table["low"]) | (high < table["high"])
    return table.assign(low=low, high=high, interval=table["interval"].mask(cut, table["interval"] + CUT))


def find_final_loss(runs: RunSet) -> pd.DataFrame:
    """Return `RUN_COLUMNS` and `value`: the mean loss of each run's last tenth of steps, at least one."""
    steps = runs.read("steps", columns=["step", "loss"]).sort_values(["run", "step"])
    later = steps.groupby("run", observed=True).cumcount(ascending=False)
    length = steps.groupby("run", observed=True)["step"].transform("size")
    last = steps[later < np.maximum(1, np.ceil(FINAL_SHARE * length))]
    # One virtual module and step: the mean is then the same code, with the same care for NaN, as everywhere.
    return _value(average_modules(last.assign(step=0), "loss"), "loss")


def find_accuracy(runs: RunSet) -> pd.DataFrame:
    """Return `RUN_COLUMNS` and `value`: the last accuracy measured after training began."""
    evals = runs.read("evals", columns=["step", "split", "metric", "value"])
    evals = evals[(evals["metric"] == "accuracy") & (evals["step"] > 0)]
    splits = sorted(evals["split"].unique(), key=lambda s: (_SPLITS.index(s) if s in _SPLITS else len(_SPLITS), s))
    return _last_step(evals[evals["split"].isin(splits[:1])])[[*RUN_COLUMNS, "value"]]


def find_final_effective_rank(runs: RunSet) -> pd.DataFrame:
    """Return `RUN_COLUMNS` and `value`: the mean effective rank over modules at each run's last recorded step."""
    return _value(average_modules(_last_step(measure_ranks(runs)), "effective_rank"), "effective_rank")


def _last_step(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["step"] == frame.groupby("run", observed=True)["step"].transform("max")]


def _value(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    return frame[[*RUN_COLUMNS, column]].rename(columns={column: "value"})
