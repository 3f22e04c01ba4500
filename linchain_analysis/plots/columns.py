"""Which columns of some runs have figures of their own, and what these are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, cast

from linchain_analysis.analysis.sources import find_measure_of
from linchain_analysis.analysis.units import find_loss_unit
from linchain_analysis.errors import InputError
from linchain_analysis.vocabulary import (
    NATS,
    Column,
    Kind,
    Table,
    columns_of,
    define_column,
    measured_columns,
    with_loss_unit,
)

if TYPE_CHECKING:
    from linchain_analysis.analysis import RunSet

_SCALARS = ("int", "float", "bool")
# These are what the figures of every run show: `loss`, `effective-rank`, `gradient-norms`, `update-norms`.
_SHOWN = {("steps", "loss"), ("modules", "effective_rank"), ("factors", "grad_norm"), ("factors", "update_norm")}


@dataclass(frozen=True)
class Drawable:
    """A column of some runs with a figure of its own.

    Attributes:
        name: Of the figure and of its folder: the column's with dashes for `_`, after the name of its table where
            another figure is called so already.
        column: Its definition; of a measure that is not known here its table, name and kind, without a unit.
        runs: Names of the runs that have the column, with or without values.
        measured: Whether a measure recorded it, so that it is drawn without being asked for.
    """

    name: str
    column: Column
    runs: tuple[str, ...]
    measured: bool


def list_drawables(runs: RunSet, taken: Iterable[str] = ()) -> dict[str, Drawable]:
    """Return by name what can be drawn of `runs`: what measures recorded first, then what has to be asked for.

    The second are the columns that every run has, those computed from spectra on reading, and what the training loop
    logged.

    Args:
        runs: Runs of any kind; each may hold other columns.
        taken: Names of other figures, in any case of letters.
    """
    loss_unit = find_loss_unit(runs)
    names = {name.casefold() for name in taken}
    found: dict[str, Drawable] = {}
    for columns, measured in ((_recorded(runs), True), (_on_request(runs), False)):
        for column, holders in columns:
            if any((other.column.table, other.column.name) == (column.table, column.name) for other in found.values()):
                continue
            name = _name(column, names)
            names.add(name.casefold())
            found[name] = Drawable(name, with_loss_unit(column, loss_unit), tuple(holders), measured)
    return found


def refuse_unknown(asked: str, possible: Iterable[str], place: str) -> InputError:
    """Return the error for a figure that is not among the `possible` ones, with the reason where it is known."""
    possible = list(possible)
    column = asked.replace("-", "_")
    known = any(define_column(table, column) is not None for table in ("steps", "modules", "factors", "links"))
    close = get_close_matches(asked, possible, n=1)
    got, do = repr(asked), f"did you mean {close[0]!r}?" if close else "correct the name"
    measure = find_measure_of(column)
    if measure is not None:
        got += ", which these runs did not record"
        tracker = f'Tracker(…, measures=["{measure}"])'
        do = f"record it, by the measure {measure!r}: {tracker} or, for maps, sweep --measures {measure}"
    elif known:
        got += ", which these runs did not record"
        maps = column in _columns_of_maps()
        do = "draw runs of synthetic maps" if maps else f'record it, by Tracker(…, measures=["{column}"]) or its preset'
    return InputError(place, expected=f"names among {', '.join(possible)}", got=got, do=do)


def _recorded(runs: RunSet) -> Iterator[tuple[Column, list[str]]]:
    """What measures added, as the manifests say; columns of `links` are always a measure's, and count where filled."""
    holders: dict[tuple[str, str, str], list[str]] = {}
    for run, name in zip(runs.runs, runs.names, strict=True):
        for table, columns in run.manifest.columns.items():
            for column_name, kind in columns:
                holders.setdefault((table, column_name, kind), []).append(name)
    fixed = [column for column in columns_of("links") if not column.key]
    for run, name in zip(runs.runs, runs.names, strict=True):
        values = run.read("links", [column.name for column in fixed])
        for column in fixed:
            if values[column.name].notna().any():
                holders.setdefault((column.table, column.name, column.kind), []).append(name)
    order = {"steps": 0, "modules": 1, "factors": 2, "links": 3}
    for key in sorted(holders, key=lambda key: order.get(key[0], len(order))):
        yield _define(*key), holders[key]


def _on_request(runs: RunSet) -> Iterator[tuple[Column, list[str]]]:
    columns = [column for table in ("steps", "modules", "factors") for column in columns_of(table) if not column.key]
    columns += [column for column in measured_columns("modules") if column.derived]
    for column in columns:
        if column.kind in _SCALARS and (column.table, column.name) not in _SHOWN:
            yield column, runs.names
    logged: dict[str, list[str]] = {}
    for run, name in zip(runs.runs, runs.names, strict=True):
        for column_name in _other_columns(run):
            logged.setdefault(column_name, []).append(name)
    # Others may log something else by the names that synthetic maps, which say the unit of their loss, have for theirs.
    of_maps = _columns_of_maps() if find_loss_unit(runs) != NATS else {}
    for column_name, holders in logged.items():
        known = of_maps.get(column_name)
        yield known or Column("steps", column_name, "float", "", "as the training loop logged it", ""), holders


def _columns_of_maps() -> dict[str, Column]:
    return {column.name: column for column in measured_columns("steps") if column.basis == "map"}


def _other_columns(run: Any) -> list[str]:
    known = {column.name for column in columns_of("steps")} | {
        name for name, _ in run.manifest.columns.get("steps", ())
    }
    return [name for name in run.steps.columns if name not in known]


def _define(table: str, name: str, kind: str) -> Column:
    definition = define_column(table, name)
    if definition is None:
        meaning = "a measure whose definition, and dependence on the gauge, were not known where this was drawn"
        return Column(cast(Table, table), name, cast(Kind, kind), "", meaning, "")
    return replace(definition, kind=cast(Kind, kind))


def _name(column: Column, taken: set[str]) -> str:
    # A name may hold anything, and becomes a folder.
    name = re.sub(r"[^\w.+]+", "-", column.name.replace("_", "-")).strip("-.") or "unnamed"
    prefixed = f"{column.table}-{name}"
    choices = [name, prefixed, *(f"{prefixed}-{number}" for number in range(2, len(taken) + 4))]
    return next(choice for choice in choices if choice.casefold() not in taken)
