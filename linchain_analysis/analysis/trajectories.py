"""Curves over steps: each run averaged over its modules and smoothed, then mean and interval over seeds."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from linchain_analysis.analysis.replication import (
    CONDITION,
    RUN_COLUMNS,
    Scale,
    check_replicates,
    complete_labels,
    summarise_over_seeds,
)

Floats = NDArray[np.float64]


def average_modules(frame: pd.DataFrame, value: str, by: Sequence[str] = ()) -> pd.DataFrame:
    """Return the mean of `value` over the modules of each run and step.

    Args:
        frame: Rows with `RUN_COLUMNS`, `step`, `by` and `value`; one row per module or several.
        value: Column to average; NaN or Inf in any module makes the mean NaN. Rows where the measure is undefined
            (a rank of delta = 0) must be left out beforehand.
        by: Columns kept apart, `factor` or `kind`.

    Returns:
        One row per run, `by` and step, sorted.
    """
    keys = ["run", *by, "step"]
    measured = frame[value].to_numpy(dtype=np.float64)
    finite = np.isfinite(measured)
    work = frame[keys].assign(**{value: np.where(finite, measured, 0.0), "broken": ~finite})
    table = (
        work.groupby(keys, sort=True, dropna=False, observed=True)
        .agg(**{value: (value, "mean"), "broken": ("broken", "max")})
        .reset_index()
    )
    table[value] = table[value].mask(table.pop("broken").astype(bool))
    # A run has one set of labels, so that millions of rows need not be grouped by them.
    labels = frame.loc[~frame["run"].duplicated(), RUN_COLUMNS]
    return labels.merge(table, on="run", how="right")[[*RUN_COLUMNS, *by, "step", value]]


def smooth(values: Floats, window: int, scale: Scale = "linear") -> Floats:
    """Return the mean of each value and the `window - 1` before it, of fewer at the start.

    It looks back only, so that a curve never falls before its cause. NaN where the window holds a value that is not
    finite. On the scale `log` it is the geometric mean; a zero, as of the first gradients behind B = 0, stays 0 and is
    left out of the means after it.
    """
    finite = np.isfinite(values)
    known = finite & (values > 0) if scale == "log" else finite
    scaled = np.log(values, out=np.full(values.shape, np.nan), where=known) if scale == "log" else values
    means = pd.Series(np.where(known, scaled, np.nan)).rolling(window, min_periods=1).mean().to_numpy()
    broken = pd.Series(~finite).rolling(window, min_periods=1).max().to_numpy() > 0
    means = np.where(known, np.exp(means), 0.0) if scale == "log" else means
    return np.where(broken, np.nan, means)


def trajectories(
    frame: pd.DataFrame, value: str, *, by: Sequence[str] = (), window: int = 1, scale: Scale = "linear"
) -> pd.DataFrame:
    """Return mean and 95 % t interval over seeds of `value` at every step, for each method.

    Runs of one group that recorded different steps are brought to the union of their steps by linear interpolation
    between recorded neighbours. The curve covers the steps that every run of the group has reached, so that it is the
    mean of the same runs everywhere.

    Args:
        frame: As `average_modules` takes it.
        value: Column to follow.
        by: Columns kept apart.
        window: Number of recorded values in the trailing mean, taken within each run before seeds are averaged.
        scale: As `summarise_over_seeds` takes it.

    Returns:
        `problem method base_learning_rate`, `by`, `step`, `mean low high num_seeds num_finite interval window`,
        sorted; empty for an empty frame.

    Raises:
        InputError: Two runs have the same condition and seeds.
    """
    averaged = complete_labels(average_modules(frame, value, by))
    check_replicates(averaged)
    groups = [*CONDITION, *by]
    aligned = [
        _align(rows, value, window, scale)
        for _, rows in averaged.groupby(groups, sort=False, dropna=False, observed=True)
    ]
    together = pd.concat(aligned, ignore_index=True) if aligned else averaged
    return summarise_over_seeds(together, value, [*groups, "step"], scale).assign(window=window)


def _align(rows: pd.DataFrame, value: str, window: int, scale: Scale) -> pd.DataFrame:
    """Bring the smoothed runs of one group to common steps; `rows` are sorted by run and step."""
    runs: dict[Hashable, pd.DataFrame] = dict(iter(rows.groupby("run", sort=False, observed=True)))
    first = max(int(run["step"].iloc[0]) for run in runs.values())
    last = min(int(run["step"].iloc[-1]) for run in runs.values())
    grid = np.unique(rows["step"].to_numpy())
    grid = grid[(grid >= first) & (grid <= last)]
    parts = []
    for run in runs.values():
        smoothed = smooth(run[value].to_numpy(dtype=np.float64), window, scale)
        head = run.drop(columns=["step", value]).iloc[[0] * len(grid)]
        parts.append(head.assign(step=grid, **{value: _read_at(grid, run["step"].to_numpy(), smoothed)}))
    return pd.concat(parts, ignore_index=True)


def _read_at(grid: NDArray[np.int64], steps: NDArray[np.int64], values: Floats) -> Floats:
    """Values at `grid`, inside the range of `steps`: exact where recorded, else linear between the neighbours."""
    right = np.searchsorted(steps, grid)
    exact = steps[right] == grid
    left = np.where(exact, right, right - 1)
    weight = np.where(exact, 0.0, (grid - steps[left]) / np.maximum(steps[right] - steps[left], 1))
    with np.errstate(invalid="ignore"):
        between = values[left] + weight * (values[right] - values[left])
    # Recorded values are taken as they are: 0 · (NaN − x) next to a gap would otherwise spread the gap.
    return np.where(exact, values[right], between)


def choose_window(num_steps: int) -> int:
    """Return the smoothing window used by figures: a twentieth of the recorded steps, at least 1."""
    return max(1, num_steps // 20)


def count_steps(frame: pd.DataFrame) -> int:
    """Return how many steps the longest run recorded, 0 for an empty frame."""
    return 0 if frame.empty else int(frame.groupby("run", observed=True)["step"].nunique().max())
