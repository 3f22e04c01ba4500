"""Learning rates compared and chosen: a method at its best rate, all methods at one rate, and how wide the choice is.

At one rate a method that moves ΔW less for each unit of rate looks slow without being worse. At its best rate it had
as many chances as the grid has rates, and a best rate chosen and reported on the same seeds is a little too good; for
all methods alike, if they had the same grid. `select_on` chooses on some seeds and reports the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from linchain_analysis.analysis.convergence import (
    find_first_steps,
    quantile,
    read_losses,
    sort_conditions,
    summarise_convergence,
)
from linchain_analysis.analysis.levels import choose_level, choose_loss_window
from linchain_analysis.analysis.replication import CONDITION, RUN_COLUMNS, check_replicates, complete_labels
from linchain_analysis.errors import InputError

if TYPE_CHECKING:
    from linchain_analysis.runs import RunSet

FEWEST_RATES = 4  # of a method, for its runs to be a sweep over rates
RULE = (
    "the rate, of those run with the most seeds, at which most seeds reach the level, among these the one with the "
    "fewest steps in the median, then with the lowest median of the final loss, then the smaller"
)


def find_sweeps(catalogue: pd.DataFrame) -> list[str]:
    """Return the problems that some method was run on at `FEWEST_RATES` learning rates or more."""
    known = complete_labels(catalogue)
    counts = known.groupby(["problem", "method"])["base_learning_rate"].nunique()
    return sorted(str(name) for name in counts[counts >= FEWEST_RATES].index.get_level_values("problem").unique())


def measure_rates(
    losses: pd.DataFrame, level: float, column: str, window: int = 1, seeds: Collection[int] | None = None
) -> pd.DataFrame:
    """Return steps to `level` and final loss of every method at every rate.

    Args:
        losses: What `read_losses` returned.
        level: A loss to reach.
        column: The loss.
        window: As `find_first_steps` takes it. Of more than 1 the final loss is the mean over the last so many steps.
        seeds: Seeds of initialisation to take; all of them by default.

    Returns:
        What `summarise_convergence` returns, with `final_loss final_low final_high`: median and quartiles over seeds
        of the loss at the last step, a diverged run counting as +inf.

    Raises:
        InputError: No run has one of the seeds, or two runs have the same condition and seeds.
    """
    if seeds is not None:
        losses = losses[losses["init_seed"].isin(list(seeds))]
        if losses.empty:
            raise InputError(
                "seeds", expected="seeds of the runs", got=", ".join(map(str, seeds)), do="name seeds that were run"
            )
    steps = summarise_convergence(find_first_steps(losses, level, column, window))
    final = losses_at(losses, column, None, window)
    final = final.rename(columns={"median": "final_loss", "low": "final_low", "high": "final_high"})
    return steps.merge(final.drop(columns="num_seeds"), on=CONDITION, how="left")


def losses_at(losses: pd.DataFrame, column: str, step: int | None = None, window: int = 1) -> pd.DataFrame:
    """Return median and quartiles over seeds of the loss at one step, for every method and rate.

    Args:
        losses: What `read_losses` returned.
        column: The loss.
        step: Which; each run's last if unset. A run that is shorter or left the finite numbers counts as +inf.
        window: Number of steps up to that one whose mean is taken.

    Returns:
        `problem method base_learning_rate num_seeds median low high`.
    """
    ends = []
    for _, run in losses.groupby("run", sort=False, observed=True):
        there = run if step is None else run[run["step"] <= step]
        whole = np.isfinite(there[column]).all() and (step is None or run["step"].iloc[-1] >= step)
        last = there[column].iloc[-window:].mean() if whole and len(there) else np.inf
        ends.append({**run[RUN_COLUMNS].iloc[0].to_dict(), "loss": float(last)})
    rows = []
    table = complete_labels(pd.DataFrame(ends, columns=[*RUN_COLUMNS, "loss"]))
    check_replicates(table)
    for condition, own in table.groupby(CONDITION, sort=True, dropna=False):
        values = own["loss"].to_numpy(dtype=np.float64)
        found = {name: quantile(values, q) for name, q in (("median", 0.5), ("low", 0.25), ("high", 0.75))}
        rows.append({**dict(zip(CONDITION, condition, strict=True)), "num_seeds": len(values), **found})
    return sort_conditions(pd.DataFrame(rows, columns=[*CONDITION, "num_seeds", "median", "low", "high"]))


def best_losses_at(losses: pd.DataFrame, column: str, step: int) -> pd.DataFrame:
    """Return, for each method, the smallest median loss at `step` over all rates, with its rate.

    A method that a smaller or larger rate could make as good as another is as good here.
    """
    table = losses_at(losses, column, step)
    best = table.groupby(["problem", "method"], sort=False, observed=True)["median"].idxmin()
    found: pd.DataFrame = table.loc[best].reset_index(drop=True)
    return found


def choose_rates(rates: pd.DataFrame, reported: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the chosen rate of each method, by `RULE`.

    A rate that was run with fewer seeds of the method than another, as after a sweep that broke off, is left out of
    its grid: all of one seed is no better than most of ten.

    Args:
        rates: What `measure_rates` returned, of the seeds to choose on.
        reported: The same of the seeds to report; those of `rates` if unset.

    Returns:
        One row per problem and method: the row of `reported` at the chosen rate, and

        - `num_tied`: other rates with as many seeds and the same median, which the further rules decided between;
        - `edge`: `smallest` or `largest` where the chosen rate is the first or the last of the grid, so that a better
          one may lie outside it; `only` for a grid of one; else empty;
        - `window_low window_high window_octaves`: smallest and largest rate around the best between which more than
          half of the seeds reach the level at every rate of the grid, and log2 of their ratio: the window is at least
          that wide, and less than a spacing of the grid wider at either side. NaN where no rate does;
        - `window_open`: whether the window reaches an edge of the grid, and so may go on outside it.

        `num_seeds` is that of the reported row, which is of all rates that competed if nothing else is reported.

    Raises:
        InputError: `reported` has no run of a method at its chosen rate.
    """
    reported = rates if reported is None else reported
    parts = []
    for (problem, method), own in rates.groupby(["problem", "method"], sort=False, observed=True):
        own = own[own["num_seeds"] == own["num_seeds"].max()]
        ordered = own.sort_values(
            ["num_reached", "median", "final_loss", "base_learning_rate"], ascending=[False, True, True, True]
        )
        chosen = ordered.iloc[0]
        tied = (own["num_reached"] == chosen["num_reached"]) & (own["median"] == chosen["median"])
        same = (reported["problem"] == problem) & (reported["method"] == method)
        row = reported[same & _is_rate(reported, chosen["base_learning_rate"])]
        if row.empty:
            raise InputError(
                "seeds to report",
                expected=f"a run of {method} at its chosen rate, {chosen['base_learning_rate']:g}, on {problem}",
                got="none",
                do="run it with these seeds as well, or choose on others",
            )
        parts.append(
            row.assign(
                num_tied=int(tied.sum()) - 1,
                edge=_find_edge(own, chosen["base_learning_rate"]),
                **_find_window(own, chosen["base_learning_rate"]),
            )
        )
    found: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return found


def at_rates(frame: pd.DataFrame, rates: Mapping[str, float]) -> pd.DataFrame:
    """Return the rows of runs in which each method stands at its rate; methods without one are left out."""
    labels = complete_labels(frame[["method", "base_learning_rate"]])
    wanted = labels["method"].map(rates)
    return frame[labels["method"].isin(list(rates)) & _is_rate(labels, wanted)]


def _is_rate(frame: pd.DataFrame, rate: float | pd.Series) -> pd.Series:
    """Whether rows have that rate; an unknown one, NaN, is a rate as any other."""
    own = frame["base_learning_rate"]
    return (own == rate) | (own.isna() & pd.isna(rate))


def choose_common_rate(rates: pd.DataFrame) -> float:
    """Return the rate, of those that every method was run at, at which most runs of all methods reach the level.

    Of several it is the one with the smallest geometric mean of the median steps, over the methods that have one at
    all of them, and then with the smallest geometric mean of the median final loss over all methods. It favours no
    method by name, and is nobody's best by design.

    Args:
        rates: What `measure_rates` returned, of one problem.

    Raises:
        InputError: No rate is common to all methods.
    """
    steps, final, reached = (
        rates.pivot(index="base_learning_rate", columns="method", values=name)
        for name in ("median", "final_loss", "num_reached")
    )
    reached = reached.dropna()
    if reached.empty:
        raise InputError(
            "learning rate", expected="one that every method was run at", got="none", do="run the same grid for all"
        )
    total = reached.sum(axis=1)
    tied = total.index[total == total.max()]
    steps, final = steps.loc[tied], final.loc[tied]
    steps = steps.loc[:, np.isfinite(steps).all()]
    with np.errstate(divide="ignore"):
        table = pd.DataFrame({"steps": np.log(steps).mean(axis=1).fillna(0.0), "final": np.log(final).mean(axis=1)})
    return float(table.rename_axis("rate").reset_index().sort_values(["steps", "final", "rate"])["rate"].iloc[0])


def tune(
    runs: RunSet,
    level: float | None = None,
    column: str | None = None,
    select_on: Collection[int] | None = None,
) -> pd.DataFrame:
    """Return each method at its own best learning rate: `choose_rates` of runs.

    Args:
        runs: Runs of one problem or several, at several rates.
        level: A loss to reach; `choose_level` if unset.
        column: The loss; as `read_losses` takes it.
        select_on: Seeds to choose the rate on, which are then not among those reported; by default the rate is chosen
            and reported on the same seeds.
    """
    losses, column = read_losses(runs, column)
    window = choose_loss_window(losses, column)
    level = choose_level(losses, column, window) if level is None else level
    rates = measure_rates(losses, level, column, window, select_on)
    if select_on is None:
        return choose_rates(rates)
    others = sorted(set(losses["init_seed"].unique()) - set(select_on))
    return choose_rates(rates, measure_rates(losses, level, column, window, others))


def _find_edge(own: pd.DataFrame, rate: float) -> str:
    if len(own) == 1:
        return "only"
    smallest, largest = own["base_learning_rate"].min(), own["base_learning_rate"].max()
    return "smallest" if rate == smallest else "largest" if rate == largest else ""


def _find_window(own: pd.DataFrame, rate: float) -> dict[str, float | bool]:
    ordered = own.sort_values("base_learning_rate", ignore_index=True)
    usable = np.isfinite(ordered["median"].to_numpy())
    place = int((ordered["base_learning_rate"] == rate).to_numpy().argmax())
    if not usable[place]:
        return {"window_low": np.nan, "window_high": np.nan, "window_octaves": np.nan, "window_open": False}
    first = last = place
    while first > 0 and usable[first - 1]:
        first -= 1
    while last < len(usable) - 1 and usable[last + 1]:
        last += 1
    low, high = (float(ordered["base_learning_rate"].iloc[k]) for k in (first, last))
    return {
        "window_low": low,
        "window_high": high,
        "window_octaves": float(np.log2(high / low)),
        "window_open": first == 0 or last == len(usable) - 1,
    }
