"""Sentences below the figure of one column: what it is, and where there is no value."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from linchain_analysis.analysis.caveats import list_caveats
from linchain_analysis.analysis.methods import sort_methods
from linchain_analysis.analysis.trajectories import count_steps
from linchain_analysis.vocabulary import Column

_AVERAGED = {
    "steps": "at every step",
    "modules": "mean over modules",
    "factors": "by factor from input (A) to output (B), mean over modules",
    "links": "by pair of neighbouring factors from input (A) to output (B), mean over modules",
}
_GAUGE = (
    "It depends on the gauge (W_i → W_i M, W_{i+1} → M⁻¹ W_{i+1}): it describes this parametrisation and not the "
    "function."
)


def describe_column(column: Column) -> str:
    """Return what a figure of `column` shows."""
    lists = ", one panel for each entry of the list" if column.kind == "values" else ""
    moment = f" (read {column.moment})" if column.moment else ""
    return f"{column.name}, {_AVERAGED[column.table]}{lists}: {column.meaning}{moment}."


def list_notes(
    runs: Sequence[str], frame: pd.DataFrame, known: pd.DataFrame, table: pd.DataFrame, column: Column
) -> list[str]:
    """Return what a reader must know: gauge, gaps, runs without the column, curves that end early or break.

    Args:
        runs: Names of all runs.
        frame: Rows of those that have the column, with `method run step panel`.
        known: Those of `frame` that the curves were computed from.
        table: The curves.
        column: The column.
    """
    notes = [_GAUGE] if column.gauge_dependent else []
    if (table["mean"] == 0).any() and table["interval"].str.contains("logarithm").any():
        notes.append("Zeros have no place on the logarithmic axis.")
    num_known, num_recorded = count_steps(known), count_steps(frame)
    if num_known < num_recorded:
        notes.append(f"It is known at {num_known} of {num_recorded} recorded steps, and drawn there.")
    places = ["run", "panel", "step"]
    counts = frame.groupby(places, observed=True)[column.name].size()
    counts_known = known.groupby(places, observed=True)[column.name].size()
    if (counts_known < counts.reindex(counts_known.index)).any():
        notes.append("Modules in which it is undefined at a step are left out of the mean there.")
    holding = known.drop_duplicates(places).groupby(["method", "panel", "step"], observed=True, dropna=False).size()
    drawn = table.set_index(["method", "panel", "step"])["num_seeds"]
    if (holding.reindex(drawn.index).fillna(0) < drawn).any():
        notes.append("A run is interpolated linearly between its known steps where others of its method know more.")
    missing = [name for name in runs if name not in set(known["run"])]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        notes.append(f"Not recorded by {', '.join(missing[:3])}{more}.")
    return [*notes, *_list_ends(frame, known, table), *list_caveats(frame, table)]


def _list_ends(frame: pd.DataFrame, known: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """Say which curves are shorter than their runs or missing, since not every one of these has values there."""
    sentences = [
        f"{method} is not drawn: there is no step at which every run of it has values."
        for method in sort_methods(set(known["method"]) - set(table["method"]))
    ]
    for method in sort_methods(table["method"]):
        own, rows, recorded = (part[part["method"] == method]["step"] for part in (table, known, frame))
        last = recorded.groupby(frame["run"], observed=True).max().min()
        if own.min() > rows.min() or own.max() < min(rows.max(), last):
            sentences.append(
                f"{method} is drawn at steps {own.min()} to {own.max()}, within which every run of it has values."
            )
    return sentences
