"""Effective ranks and update ratios as they come in, summed up by kind of module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.runs.manifest import ModuleRecord
from linchain_analysis.watching.growing import Growing
from linchain_analysis.watching.view import NAN, KindRank

Rows = Mapping[str, NDArray[Any]]


class Waiting:
    """Rows that count as soon as their step is finished: its row in `steps` is written last."""

    def __init__(self) -> None:
        self._parts: list[Rows] = []

    def sort_out(self, rows: Rows, finished: NDArray[np.float64]) -> Rows:
        """Return the rows of finished steps, new ones and those that have waited, and keep those of later steps."""
        parts = [*self._parts, rows]
        every = {name: np.concatenate([part[name] for part in parts]) for name in rows}
        last = finished[-1] if len(finished) else 0
        later = every["step"] > last
        self._parts = [{name: values[later] for name, values in every.items()}] if later.any() else []
        counts = ~later & np.isin(every["step"], finished)
        return every if counts.all() else {name: values[counts] for name, values in every.items()}


class RanksSoFar:
    """Effective rank by kind of module, at every recorded step.

    Args:
        records: The modules, as numbered in the run.
    """

    def __init__(self, records: Sequence[ModuleRecord]) -> None:
        self._kinds = list(dict.fromkeys(record.kind for record in records))
        self._kind_of = np.array([self._kinds.index(record.kind) for record in records], dtype=np.int64)
        self._medians = Growing(self._kinds)
        self._last = np.zeros(0), np.zeros(0, dtype=np.int64)
        self._waiting = Waiting()

    def add(self, rows: Rows, finished: NDArray[np.float64]) -> None:
        """Add `step`, `module` (its number) and `effective_rank` of rows, ascending by step."""
        rows = self._waiting.sort_out(rows, finished)
        defined = ~np.isnan(rows["effective_rank"])
        step, values = rows["step"][defined].astype(np.int64), rows["effective_rank"][defined]
        kind = self._kind_of[rows["module"][defined]]
        if not len(step):
            return
        groups, medians = group_medians(step * len(self._kinds) + kind, values)
        steps = np.unique(step)
        columns = {name: np.full(len(steps), np.nan) for name in self._kinds}
        for place, name in enumerate(self._kinds):
            own = groups % len(self._kinds) == place
            columns[name][np.searchsorted(steps, groups[own] // len(self._kinds))] = medians[own]
        self._medians.append(columns, len(steps))
        self._last = values[step == steps[-1]], kind[step == steps[-1]]

    def view(self) -> tuple[tuple[KindRank, ...], float]:
        """Return the ranks by kind, and the median over all modules."""
        values, kinds = self._last
        found = []
        for place, name in enumerate(self._kinds):
            own = values[kinds == place]
            summary = (float(np.median(own)), float(own.min()), float(own.max())) if len(own) else (NAN, NAN, NAN)
            found.append(KindRank(name, *summary, self._medians[name].copy()))
        return tuple(found), float(np.median(values)) if len(values) else NAN


class RatiosSoFar:
    """Update ratio by kind of module and factor, at the last recorded step.

    Args:
        records: The modules, as numbered in the run.
        factors: Names of factors, as numbered in the run.
    """

    def __init__(self, records: Sequence[ModuleRecord], factors: Sequence[str]) -> None:
        self._kinds = list(dict.fromkeys(record.kind for record in records))
        self._kind_of = np.array([self._kinds.index(record.kind) for record in records], dtype=np.int64)
        # In the order of the longest chain, where chains differ: A, W1, W2, B although B was named second.
        named = sorted((record.factors for record in records), key=len, reverse=True)
        order = list(dict.fromkeys([name for own in named for name, _ in own]))
        self._order, self._factors = order, list(factors)
        self._last: Rows = {}
        self._waiting = Waiting()

    def add(self, rows: Rows, finished: NDArray[np.float64]) -> None:
        """Add `step`, `module` and `factor` (their numbers) and `update_ratio` of rows, ascending by step."""
        rows = self._waiting.sort_out(rows, finished)
        if len(rows["step"]):
            last = rows["step"] == rows["step"].max()
            self._last = {name: values[last] for name, values in rows.items()}

    def view(self) -> tuple[dict[str, dict[str, float]], float]:
        """Return the medians by kind and factor, in the order of the model and of the chain, and the one over all."""
        if not self._last:
            return {}, NAN
        values, factor = self._last["update_ratio"], self._last["factor"]
        kind = self._kind_of[self._last["module"]]
        defined = ~np.isnan(values)
        if not defined.any():
            return {}, NAN
        found: dict[str, dict[str, float]] = {}
        for place, name in enumerate(self._kinds):
            present = set(factor[kind == place].tolist())
            for of_factor in self._order:
                number = self._factors.index(of_factor)
                own = values[(kind == place) & (factor == number) & defined]
                if number in present:
                    found.setdefault(name, {})[of_factor] = float(np.median(own)) if len(own) else NAN
        return found, float(np.median(values[defined]))


def group_medians(
    groups: NDArray[np.int64], values: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return each group, ascending, and the median of its values, of which none is NaN."""
    order = np.lexsort((values, groups))
    ordered = values[order]
    found, first, count = np.unique(groups[order], return_index=True, return_counts=True)
    return found, (ordered[first + (count - 1) // 2] + ordered[first + count // 2]) / 2
