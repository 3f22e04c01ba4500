"""How many steps a run needs to reach a level of the loss, where some runs never reach it.

A run that never reached the level is censored: all that is known is that it needs more steps than it was given. It
stays in as such, counted as slower than every run that arrived. Means over the runs that did arrive would prefer a
method that fails often and is fast otherwise; a median that counts the others as +inf does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from linchain_analysis.analysis.methods import sort_methods
from linchain_analysis.analysis.replication import CONDITION, RUN_COLUMNS, check_replicates, complete_labels
from linchain_analysis.analysis.trajectories import smooth
from linchain_analysis.errors import InputError

if TYPE_CHECKING:
    from linchain_analysis.runs import RunSet

RELATIVE_LOSS, EXCESS_LOSS = "relative_loss", "excess_loss"


def read_losses(runs: RunSet, column: str | None = None) -> tuple[pd.DataFrame, str]:
    """Return `RUN_COLUMNS`, `step` and a loss of every step, sorted by run and step, and the name of the loss.

    Args:
        runs: The runs.
        column: Column of `steps`; if unset `relative_loss` where every run logged it, `excess_loss` where that is
            undefined in all of them (of the target 0, to which nothing is relative), else `loss`. `loss` is read
            before the step and the others after it, so that it arrives one step later.
    """
    choices = [RELATIVE_LOSS, EXCESS_LOSS, "loss"] if column is None else [column]
    for name in choices:
        try:
            frame = runs.read("steps", columns=["step", name])
        except (InputError, KeyError):
            if name == choices[-1]:
                raise
            continue
        if name != choices[-1] and frame[name].isna().all():
            continue
        return frame.sort_values(["run", "step"], ignore_index=True), name
    raise AssertionError("the last name either returns or raises")


def find_first_steps(losses: pd.DataFrame, level: float, column: str, window: int = 1) -> pd.DataFrame:
    """Return, for every run, the first step at which its loss is at most `level`.

    Args:
        losses: What `read_losses` returned.
        level: In the unit of the column.
        column: Its loss.
        window: Number of values in the trailing mean that is taken before; a noisy loss crosses a level by chance.

    Returns:
        One row per run: `RUN_COLUMNS`, `first_step` (NaN where it never was), `reached`, `diverged` (a loss that is
        not finite; such a run never counts as having reached the level, since nobody would use it) and `last_step`.

    Raises:
        InputError: A level that is no finite number.
    """
    if not np.isfinite(level):
        raise InputError("level", expected="a finite number", got=repr(level), do="give a loss to reach")
    rows = []
    for _, own in losses.groupby("run", sort=False, observed=True):
        values = own[column].to_numpy(dtype=np.float64)
        diverged = not bool(np.isfinite(values).all())
        with np.errstate(invalid="ignore"):
            below = smooth(values, window) <= level
        reached = bool(below.any()) and not diverged
        steps = own["step"].to_numpy()
        rows.append(
            {
                **own[RUN_COLUMNS].iloc[0].to_dict(),
                "first_step": float(steps[below.argmax()]) if reached else np.nan,
                "reached": reached,
                "diverged": diverged,
                "last_step": int(steps[-1]),
            }
        )
    return complete_labels(pd.DataFrame(rows, columns=[*RUN_COLUMNS, "first_step", "reached", "diverged", "last_step"]))


def summarise_convergence(first_steps: pd.DataFrame) -> pd.DataFrame:
    """Return the median and the quartiles of the first step over seeds, for every method and learning rate.

    Runs that never reached the level count as +inf, so that the median is inf unless more than half of the seeds
    reached it; neither is it a statement about how long those would have taken.

    Args:
        first_steps: What `find_first_steps` returned.

    Returns:
        `problem method base_learning_rate num_seeds num_reached num_diverged median low high`, low and high being the
        quartiles; by problem, method (in the order of every legend) and rate.

    Raises:
        InputError: Two runs have the same condition and seeds.
    """
    check_replicates(first_steps)
    rows = []
    for condition, own in first_steps.groupby(CONDITION, sort=True, dropna=False, observed=True):
        steps = own["first_step"].fillna(np.inf).to_numpy(dtype=np.float64)
        rows.append(
            {
                **dict(zip(CONDITION, condition, strict=True)),
                "num_seeds": len(own),
                "num_reached": int(own["reached"].sum()),
                "num_diverged": int(own["diverged"].sum()),
                **dict(zip(("median", "low", "high"), (quantile(steps, q) for q in (0.5, 0.25, 0.75)), strict=True)),
            }
        )
    columns = [*CONDITION, "num_seeds", "num_reached", "num_diverged", "median", "low", "high"]
    return sort_conditions(pd.DataFrame(rows, columns=columns))


def quantile(values: NDArray[np.float64], q: float) -> float:
    """Return the quantile of numbers that may be +inf: linear between neighbours (Hyndman & Fan 1996, type 7).

    Between a finite number and +inf it is +inf; NumPy makes NaN of that, and of two infinite neighbours as well. NaN
    for no values or where one of them is NaN.
    """
    if not len(values) or np.isnan(values).any():
        return float("nan")
    ordered = np.sort(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    left, right = float(ordered[low]), float(ordered[min(low + 1, len(ordered) - 1)])
    return left if place == low or left == right else left + (place - low) * (right - left)


def sort_conditions(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows by problem, then method in the order of every legend, then learning rate."""
    order = {method: place for place, method in enumerate(sort_methods(table["method"]))}
    rank = table["method"].map(order).astype(float)
    return table.iloc[np.lexsort((table["base_learning_rate"], rank, table["problem"].astype(str)))].reset_index(
        drop=True
    )
