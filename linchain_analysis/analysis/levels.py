"""To which level of a loss steps are counted, where nobody says one."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from linchain_analysis.analysis.convergence import EXCESS_LOSS, RELATIVE_LOSS
from linchain_analysis.analysis.replication import CONDITION, RUN_COLUMNS, complete_labels
from linchain_analysis.analysis.trajectories import choose_window, smooth
from linchain_analysis.errors import InputError

RELATIVE_LEVEL = 1e-3


def choose_level(losses: pd.DataFrame, column: str, window: int = 1) -> float:
    """Return a level of the loss to count steps to, below the loss that training starts from.

    1e-3 of a relative loss, where at some rate more than half of some method's seeds get there. Otherwise the lowest
    one that more than half of the seeds of every method reach at some time and some rate (a loss with noise in it
    falls and rises again), rounded up to two digits. Methods that never get below the start are left out of that; if
    none does, it is half of the start, and no method gets there.
    """
    best = _smallest_losses(losses, column, window)
    if column == RELATIVE_LOSS and best.min() <= RELATIVE_LEVEL:
        return RELATIVE_LEVEL
    finite = best[np.isfinite(best)]
    if finite.empty:
        raise InputError(
            "level", expected="a method of which half of the runs stay finite", got="none", do="run smaller rates"
        )
    start = _start(losses, column)
    falling = finite[finite < start]
    if falling.empty:
        return start - abs(start) / 2
    level = float(falling.max())
    rounded = _round_up(level)
    return rounded if rounded < start else level


def _smallest_losses(losses: pd.DataFrame, column: str, window: int) -> pd.Series:
    """By method, the smallest loss that more than half of its seeds reach at one rate; +inf where half diverge."""
    ends = []
    for _, run in losses.groupby("run", sort=False, observed=True):
        values = run[column].to_numpy(dtype=np.float64)
        least = smooth(values, window).min() if np.isfinite(values).all() and len(values) else np.inf
        ends.append({**run[RUN_COLUMNS].iloc[0].to_dict(), "loss": float(least)})
    table = complete_labels(pd.DataFrame(ends, columns=[*RUN_COLUMNS, "loss"]))
    # The middle one, or of an even number the larger of two: a level between them would have a median of infinity.
    middle = table.groupby(CONDITION, dropna=False)["loss"].agg(lambda own: own.sort_values().iloc[len(own) // 2])
    best: pd.Series = middle.groupby("method").min()
    return best


def _start(losses: pd.DataFrame, column: str) -> float:
    """The loss before training, of others than the relative one as the first value tells it."""
    if column == RELATIVE_LOSS:
        return 1.0
    return float(losses.groupby("run", sort=False, observed=True)[column].first().median())


def _round_up(value: float) -> float:
    """The smallest number of two digits that is not below `value`."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 1)
    nearest = float(f"{value:.1e}")
    return nearest if nearest >= value else float(f"{nearest + unit:.1e}")


def choose_loss_window(losses: pd.DataFrame, column: str) -> int:
    """Return over how many steps a loss is averaged: 1 for the exact losses of maps, else as figures smooth it."""
    num_steps = int(losses.groupby("run", observed=True).size().max()) if len(losses) else 1
    return 1 if column in (RELATIVE_LOSS, EXCESS_LOSS) else choose_window(num_steps)
