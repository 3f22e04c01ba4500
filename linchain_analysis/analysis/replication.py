"""What counts as one independent repetition, and the interval over repetitions.

The unit of replication is the seed: runs of one method, problem and learning rate that differ in their seeds only.
Steps, modules and factors within a run depend on each other, so they are averaged inside the run and never counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from linchain_analysis.errors import InputError

Scale = Literal["linear", "log"]

CONDITION = ["problem", "method", "base_learning_rate"]
SEEDS = ["init_seed", "data_seed"]
RUN_COLUMNS = ["run", *CONDITION, *SEEDS]
LEVEL = 0.95
UNNAMED = "unnamed"
INTERVAL = "95 % t interval over seeds"
LOG_INTERVAL = "95 % t interval of the logarithm over seeds"
RUN_INTERVAL = INTERVAL.replace("seeds", "runs (seeds not recorded)")
LOG_RUN_INTERVAL = LOG_INTERVAL.replace("seeds", "runs (seeds not recorded)")


def complete_labels(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `frame` with `unnamed` for a method or problem that a run does not know, and NaN for a learning rate.

    Labels that `frame` does not have are left out.
    """
    names = {
        name: frame[name].astype(object).where(frame[name].notna(), UNNAMED)
        for name in ("run", "method", "problem")
        if name in frame
    }
    if "base_learning_rate" in frame:
        names["base_learning_rate"] = pd.to_numeric(frame["base_learning_rate"]).astype(np.float64)
    return frame.assign(**names)


def check_replicates(frame: pd.DataFrame) -> None:
    """Refuse two runs of one condition with the same recorded seeds.

    They are either copies of each other or differ in something that the run columns do not say, and averaging them
    as two seeds would be wrong in both cases.

    Args:
        frame: Any rows with `RUN_COLUMNS`.

    Raises:
        InputError: With the names of the two runs.
    """
    runs = frame[RUN_COLUMNS].drop_duplicates("run")
    runs = runs[runs[SEEDS].notna().all(axis=1)]
    for _, same in runs.groupby([*CONDITION, *SEEDS], dropna=False, observed=True):
        if len(same) > 1:
            _refuse(same)


def summarise_over_seeds(frame: pd.DataFrame, value: str, by: Sequence[str], scale: Scale = "linear") -> pd.DataFrame:
    """Return mean and 95 % t interval of `value` over runs, for every group of `by`.

    mean ± t(0.975, n−1) · s/√n with the sample standard deviation s; on the scale `log` the same of ln(value), carried
    back by exp (a geometric mean, whose interval stays positive).

    Args:
        frame: One row per run and group; holds `by`, `value` and the seed columns.
        value: Column of measurements.
        by: Columns that make a group.
        scale: Scale on which seeds are taken to be normal.

    Returns:
        `by` and `mean low high num_seeds num_finite interval`, sorted by `by`. A run that is NaN or infinite stays
        in: `num_finite` is below `num_seeds`, and mean, low and high are NaN, because no number would be true. low
        and high are NaN with one seed. On the scale `log` a zero makes the mean 0 and the interval NaN.
    """
    keys = list(by)
    measured = frame[value].to_numpy(dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.log(measured) if scale == "log" else measured
    work = frame[keys].assign(
        scaled=np.where(np.isfinite(scaled), scaled, 0.0),
        finite=np.isfinite(measured),
        zero=(measured == 0) & (scale == "log"),
        seeded=frame[SEEDS].notna().all(axis=1).to_numpy(),
    )
    grouped = work.groupby(keys, sort=True, dropna=False, observed=True)
    table = grouped.agg(
        center=("scaled", "mean"),
        spread=("scaled", "std"),
        num_seeds=("scaled", "size"),
        num_finite=("finite", "sum"),
        zero=("zero", "any"),
        seeded=("seeded", "all"),
    ).reset_index()
    num = table["num_seeds"].to_numpy()
    whole = table["num_finite"].to_numpy() == num
    zero = table["zero"].to_numpy(dtype=bool)
    center = np.where(whole, table["center"], np.nan)
    half = stats.t.ppf(0.5 + LEVEL / 2, np.maximum(num - 1, 1)) * table["spread"] / np.sqrt(num)
    half = np.where(whole & ~zero & (num > 1), half, np.nan)
    mean, low, high = center, center - half, center + half
    if scale == "log":
        mean, low, high = np.where(whole & zero, 0.0, np.exp(mean)), np.exp(low), np.exp(high)
    names = (LOG_INTERVAL, LOG_RUN_INTERVAL) if scale == "log" else (INTERVAL, RUN_INTERVAL)
    return table[keys].assign(
        mean=mean,
        low=low,
        high=high,
        num_seeds=num,
        num_finite=table["num_finite"].to_numpy(),
        interval=np.where(table["seeded"], *names),
    )


def _refuse(same: pd.DataFrame) -> None:
    first = same.iloc[0]
    names = ", ".join(same["run"].astype(str))
    raise InputError(
        "runs",
        expected=f"one run of {first['method']} for each pair of seeds",
        got=f"{len(same)} with seeds {first['init_seed']:g}/{first['data_seed']:g}: {names}",
        do="leave all but one out, or compare them apart if their settings differ",
    )
