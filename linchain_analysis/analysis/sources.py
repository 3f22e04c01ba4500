"""Which measure it takes to record a column."""

from __future__ import annotations

from linchain_analysis.measures.registry import all_measures


def find_measure_of(name: str) -> str | None:
    """Return the name of the measure that is called `name` or fills in the column called so; None without one.

    Columns that are computed from stored spectra when they are read need no measure.
    """
    for found in all_measures().values():
        if found.level != "reading" and (found.name == name or any(column.name == name for column in found.columns)):
            return found.name
    return None
