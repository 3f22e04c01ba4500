"""The tables that end a sweep, for a terminal of eighty columns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from linchain_analysis.analysis.convergence import RELATIVE_LOSS, read_losses
from linchain_analysis.analysis.learning_rates import RULE, tune
from linchain_analysis.analysis.levels import RELATIVE_LEVEL, choose_level, choose_loss_window
from linchain_analysis.analysis.summary import summarise_methods
from linchain_analysis.errors import InputError

if TYPE_CHECKING:
    from linchain_analysis.runs import RunSet

# Two lines a cell, and headings of two lines: eighty columns hold the table.
_HEADINGS = {"final_loss": "final loss", "accuracy": "accuracy", "final_effective_rank": "final\neffective rank"}


def tabulate_text(runs: RunSet) -> Table:
    """Return the comparison of methods: of each measure the mean over seeds and its 95 % interval."""
    summary = summarise_methods(runs)
    table = Table(title="mean and 95 % interval over seeds", box=SIMPLE_HEAD, leading=1, padding=0, pad_edge=False)
    for heading in ("method", "learning\nrate", "seeds", *_HEADINGS.values()):
        table.add_column(heading, no_wrap=True)
    for (method, rate), rows in summary.groupby(["method", "base_learning_rate"], sort=False):
        values = zip(rows["measure"], rows["mean"], rows["low"], rows["high"], strict=True)
        cells = {measure: _tell_interval(mean, low, high) for measure, mean, low, high in values}
        seeds = str(rows["num_seeds"].max())
        table.add_row(str(method), f"{rate:g}", seeds, *(cells.get(measure, "") for measure in _HEADINGS))
    return table


def tabulate_maps(runs: RunSet) -> list[Table | str]:
    """Return each method at its best learning rate, and by what rule that was chosen."""
    losses, column = read_losses(runs)
    try:
        number = choose_level(losses, column, choose_loss_window(losses, column))
    except InputError:  # every method diverged, which the table says
        number = RELATIVE_LEVEL
    best = tune(runs, number, column)
    level, words = f"{number:.3g}", "training loss" if column == "loss" else column.replace("_", " ")
    table = Table(title="each method at its best learning rate", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in ("method", "learning\nrate", "seeds", f"final\n{words}", f"reached\n{level}", "at\nstep"):
        table.add_column(heading, no_wrap=True)
    for row in best.to_dict("records"):
        table.add_row(
            str(row["method"]),
            f"{row['base_learning_rate']:.4g}" + ("*" if row["edge"] in ("smallest", "largest") else ""),
            str(row["num_seeds"]) + (f"\n({row['num_diverged']} not finite)" if row["num_diverged"] else ""),
            f"{row['final_loss']:.3g}" if math.isfinite(row["final_loss"]) else "not finite",
            f"{row['num_reached'] / row['num_seeds']:.0%}",
            f"{row['median']:g}" if math.isfinite(row["median"]) else "",
        )
    notes = "" if column == RELATIVE_LOSS else "The relative loss is undefined in all runs, as it is of the target 0. "
    notes += (
        f"Medians over seeds; of a run that did not reach {level} as if it did so at infinity. The best rate is {RULE}."
        " It was chosen on the seeds that are shown, which flatters every method."
    )
    if best["edge"].isin(["smallest", "largest"]).any():
        notes += " *: the smallest or largest that was tried, so a better one may lie outside."
    return [table, notes]


def _tell_interval(mean: float, low: float, high: float) -> str:
    # One seed, or a run that diverged, leaves no interval.
    return f"{mean:.3g}" if math.isnan(low) else f"{mean:.3g}\n{low:.3g} … {high:.3g}"
