"""Ranks of delta at equal progress: when the loss first falls to a level, at its smallest, and at the end.

At one step a slower method is at another place of its path, so that a difference in rank may be one in progress.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from linchain_analysis.analysis.convergence import find_first_steps
from linchain_analysis.analysis.replication import CONDITION, RUN_COLUMNS, complete_labels, summarise_over_seeds
from linchain_analysis.analysis.trajectories import average_modules

MINIMUM, END = "smallest", "at the end"


def match_ranks(
    losses: pd.DataFrame,
    ranks: pd.DataFrame,
    column: str,
    levels: Sequence[float] = (0.5, 0.1),
    measure: str = "effective_rank",
) -> pd.DataFrame:
    """Return the rank of every run, mean over its modules, at each level of the loss, at its smallest and at the end.

    A rank at a step between two recorded ones is interpolated linearly. Spectra are recorded more rarely late in a
    run, so that the smallest is that of the recorded steps.

    Args:
        losses: What `convergence.read_losses` returned.
        ranks: What `ranks.measure_ranks` returned: steps where delta is not zero.
        column: The loss.
        levels: Levels of it.
        measure: Which rank.

    Returns:
        `RUN_COLUMNS`, `moment` (`loss ≤ 0.5`, …, `smallest`, `at the end`), `step` and `measure`. NaN for a level that
        a run did not reach, and everywhere in a run that left the finite numbers.
    """
    averaged = average_modules(ranks, measure)
    curves: dict[Hashable, pd.DataFrame] = dict(iter(averaged.groupby("run", sort=False, observed=True)))
    parts = []
    for level in levels:
        found = find_first_steps(losses, level, column)
        at = found["first_step"].to_numpy(dtype=np.float64)
        values = [_read(curves.get(run), step, measure) for run, step in zip(found["run"], at, strict=True)]
        parts.append(found[RUN_COLUMNS].assign(moment=f"loss ≤ {level:g}", step=at, **{measure: values}))
    for moment in (MINIMUM, END):
        rows = [_pick(own, measure, moment) for own in curves.values()]
        parts.append(complete_labels(pd.DataFrame(rows, columns=[*RUN_COLUMNS, "step", measure])).assign(moment=moment))
    return pd.concat(parts, ignore_index=True)[[*RUN_COLUMNS, "moment", "step", measure]]


def summarise_matched_ranks(matched: pd.DataFrame, measure: str = "effective_rank") -> pd.DataFrame:
    """Return mean and 95 % t interval over the seeds that reached each moment.

    Returns:
        `problem method base_learning_rate moment mean low high num_seeds num_finite interval`, and `num_missing`:
        seeds without a value at that moment, which the mean leaves out and does not speak for.
    """
    known = matched[matched[measure].notna()]
    table = summarise_over_seeds(known, measure, [*CONDITION, "moment"])
    counts = matched.groupby([*CONDITION, "moment"], dropna=False, observed=True).size().rename("total").reset_index()
    table = table.merge(counts, on=[*CONDITION, "moment"], how="right")
    num_seeds = table["num_seeds"].fillna(0).astype(int)
    return table.assign(num_seeds=num_seeds, num_missing=table.pop("total") - num_seeds)


def _read(curve: pd.DataFrame | None, step: float, measure: str) -> float:
    if curve is None or np.isnan(step):
        return float("nan")
    return float(np.interp(step, curve["step"], curve[measure], left=np.nan, right=np.nan))


def _pick(curve: pd.DataFrame, measure: str, moment: str) -> dict[Hashable, Any]:
    """Return the row of the smallest value, or the last row; NaN where a value is missing."""
    labels = curve[RUN_COLUMNS].iloc[0].to_dict()
    values = curve[measure].to_numpy(dtype=np.float64)
    if np.isnan(values).any():
        return {**labels, "step": np.nan, measure: np.nan}
    place = int(values.argmin()) if moment == MINIMUM else -1
    return {**labels, "step": float(curve["step"].iloc[place]), measure: float(values[place])}
