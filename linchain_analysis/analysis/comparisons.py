"""Which runs belong into one figure: those where each method stands at one problem and one learning rate."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass

import pandas as pd

from linchain_analysis.analysis.replication import UNNAMED, complete_labels
from linchain_analysis.errors import InputError


@dataclass(frozen=True)
class Comparison:
    """Runs that can be drawn together.

    Attributes:
        name: Short name, usable as a folder: `sums`, or `sums-lr0.001` where a method was run at several rates.
        runs: Names of the runs.
    """

    name: str
    runs: tuple[str, ...]


def split_comparisons(catalogue: pd.DataFrame) -> list[Comparison]:
    """Return the comparisons in a set of runs: one a problem, or one a learning rate where methods have several.

    Methods that each have one rate of their own stay together, as when each is shown at its best.

    Args:
        catalogue: One row per run, with `run method problem base_learning_rate`.
    """
    comparisons = []
    for problem, same in complete_labels(catalogue).groupby("problem", sort=True):
        name = _slug(problem)
        if (same.groupby("method")["base_learning_rate"].nunique(dropna=False) <= 1).all():
            comparisons.append(Comparison(name, tuple(same["run"])))
            continue
        for rate, part in same.groupby("base_learning_rate", dropna=False, sort=True):
            comparisons.append(Comparison(f"{name}-lr{_slug(rate)}", tuple(part["run"])))
    return comparisons


def require_one_condition(frame: pd.DataFrame) -> None:
    """Refuse rows where a method stands at several problems or learning rates, which no one curve can show.

    Raises:
        InputError: With the first such method and its conditions.
    """
    conditions = frame[["method", "problem", "base_learning_rate"]].drop_duplicates()
    for method, own in conditions.groupby("method", sort=True):
        if len(own) > 1:
            told = ", ".join(f"{row.problem} at {row.base_learning_rate:g}" for row in own.itertuples())
            raise InputError(
                "runs",
                expected=f"{method} at one problem and learning rate",
                got=told,
                do="draw one figure for each (`split_comparisons` says which runs go together)",
            )


def _slug(value: Hashable) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.") or UNNAMED
