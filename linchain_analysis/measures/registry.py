"""What can be measured: every measure with its columns, found by looking through this package.

A measure is one function in one file of this package, marked by `@measure` (on the small parts of chains) or
`@spectral_measure` (on stored singular values). Nothing else has to be touched: presets, tables, `audit`, figures and
the page of columns ask here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from typing import Literal

import numpy as np

from linchain_analysis.errors import InputError
from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.spectral import Array
from linchain_analysis.vocabulary import Column, Table, columns_of

Level = Literal["light", "standard", "full", "named", "reading"]
Need = Literal["gradients", "tokens", "base", "start"]
Values = Mapping[str, Array]

# What the tracker records by itself, and the columns that come of it; the names can be picked as those of measures can.
BUILT_IN: dict[str, tuple[str, ...]] = {
    "norms": ("grad_norm", "update_norm", "weight_norm", "update_ratio", "delta_norm", "delta_update_norm"),
    "cosines": ("grad_cosine_previous", "descent_cosine"),
    "spectra": (
        "spectrum",
        "delta_update_spectrum",
        "delta_spectral_norm",
        "effective_rank",
        "stable_rank",
        "delta_update_effective_rank",
    ),
}

_MCCANDLISH = "McCandlish et al. 2018, An empirical model of large-batch training (arXiv 1812.06162), appendix A.1"
_AT_STEP = "before clipping; NaN in a step of one backward pass"

NOISE_COLUMNS = (
    Column(
        "steps",
        "noise_gradient_square",
        "float",
        "nats²/weight²",
        "|G|²: unbiased estimate of the squared norm of the gradient over all data, from the gradients of the step's "
        "first backward pass and of the whole step; may be negative",
        _AT_STEP,
        gauge_dependent=True,
        source=_MCCANDLISH,
        basis="noise",
    ),
    Column(
        "steps",
        "noise_trace",
        "float",
        "nats²/weight²",
        "tr Σ: unbiased estimate of the variance of the gradient of one backward pass; may be negative",
        _AT_STEP,
        gauge_dependent=True,
        source=_MCCANDLISH,
        basis="noise",
    ),
    Column(
        "steps",
        "noise_scale",
        "float",
        "backward passes",
        "tr Σ/|G|² from moving averages of both over about 100 steps: the gradient noise scale in micro-batches; NaN "
        "while the average of |G|² is not positive",
        _AT_STEP,
        gauge_dependent=True,
        source=_MCCANDLISH,
        basis="noise",
    ),
)

# What a synthetic map, whose smallest loss is known, says of every step beside the loss.
MAP_COLUMNS = (
    Column(
        "steps",
        "relative_loss",
        "float",
        "1",
        "of a synthetic map with the target T: ½E‖x(ΔW − T)‖² over new inputs x, without noise, divided by ½E‖xT‖², "
        "which it is for ΔW = 0; NaN for T = 0",
        "after the step",
        basis="map",
    ),
    Column(
        "steps",
        "excess_loss",
        "float",
        "1",
        "of a synthetic map: training loss (its expectation where every step draws fresh inputs) minus the smallest "
        "that any ΔW of the chain's rank can have; NaN where that is not known, as for most losses of missing entries",
        "after the step",
        basis="map",
    ),
)


@dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
        name: That of its function, without `measure_`.
        function: From `Cores` of k modules to values by column name: (k,) for a column of `modules`, (k, factors) or
            (k, links) for those tables; one more axis for columns that are lists.
        columns: What it fills in.
        level: The cheapest preset that includes it; `named` ones have to be asked for, `reading` ones are computed
            from stored spectra when they are read.
        needs: What the probes have to supply beyond factors and updates.
        sampled: Whether it is too dear for every step, and taken at every `sample_every`-th only.
        source: For `reading`: the stored spectrum it takes.
    """

    name: str
    function: Callable[..., Values | Array]
    columns: tuple[Column, ...]
    level: Level
    needs: frozenset[Need]
    sampled: bool
    source: str = ""

    @property
    def summary(self) -> str:
        """First line of its function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]


_FOUND: dict[str, Measure] = {}


def measure(
    *columns: Column, level: Level = "full", needs: Iterable[Need] = (), sampled: bool = False
) -> Callable[[Callable[[Cores], Values]], Callable[[Cores], Values]]:
    """Mark a function of `Cores` as a measure that fills in `columns`.

    It is called without warnings of overflow and of invalid numbers: a diverged module gets NaN.
    """

    def mark(function: Callable[[Cores], Values]) -> Callable[[Cores], Values]:
        quiet = np.errstate(over="ignore", invalid="ignore")(function)
        _enter(quiet, columns, level, frozenset(needs), sampled)
        return quiet

    return mark


def spectral_measure(
    meaning: str, *, unit: str = "directions", name: str = "", formula_source: str = "", spectrum: str = "spectrum"
) -> Callable[[Callable[[Array], Array]], Callable[[Array], Array]]:
    """Mark a function of singular values (..., r), descending and padded with zeros, as a column of `modules`.

    Args:
        meaning: What the column says, with its formula.
        unit: Its unit.
        name: Its name; the function's where it is not said.
        formula_source: Where the formula comes from.
        spectrum: The stored column that it takes.
    """

    def mark(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
        column = Column(
            "modules",
            name or function.__name__,
            "float",
            unit,
            meaning,
            "after the step",
            derived=True,
            source=formula_source,
            basis="factors" if spectrum == "spectrum" else "update",
        )
        _enter(function, (column,), "reading", frozenset(), False, column.name, spectrum)
        return function

    return mark


def _enter(
    function: Callable[..., Values | Array],
    columns: tuple[Column, ...],
    level: Level,
    needs: frozenset[Need],
    sampled: bool,
    name: str = "",
    source: str = "",
) -> None:
    name = name or function.__name__.removeprefix("measure_")
    known = _FOUND.get(name)
    if known is not None and known.function.__module__ != function.__module__:
        raise InputError(
            function.__module__, expected="a measure with a name of its own", got=repr(name), do="rename the function"
        )
    for column in columns:
        fixed = next((other for other in columns_of(column.table) if other.name == column.name), column)
        others = [other.name for other in _FOUND.values() if other.name != name and _fills(other, column)]
        if others or fixed != column:
            raise InputError(
                f"measure {name!r}",
                expected="columns with names of their own",
                got=f"{column.name!r} of {column.table}, which {', '.join(others) or 'the tracker'} fills in",
                do="rename the column",
            )
    moment = "after the step" + (", at sampled steps" if sampled else "")
    filled = tuple(column if column.moment else replace(column, moment=moment) for column in columns)
    _FOUND[name] = Measure(name, function, filled, level, needs, sampled, source)


def _fills(other: Measure, column: Column) -> bool:
    return any((filled.table, filled.name) == (column.table, column.name) for filled in other.columns)


def all_measures() -> dict[str, Measure]:
    """Return every measure by name: those of this package and those that the user has marked."""
    _load()
    return dict(_FOUND)


@cache
def _load() -> None:
    package = importlib.import_module("linchain_analysis.measures")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def find_measure(name: str) -> Measure:
    """Return the measure called `name`, or the one that fills in the column called so.

    Raises:
        InputError: There is none.
    """
    found = all_measures()
    if name in found:
        return found[name]
    for candidate in found.values():
        if any(column.name == name for column in candidate.columns):
            return candidate
    names = [*found, *(column.name for candidate in found.values() for column in candidate.columns)]
    close = get_close_matches(str(name), names, n=1)
    raise InputError(
        "measure",
        expected=f"one of {', '.join(sorted(found))}",
        got=repr(name),
        do=f"did you mean {close[0]!r}?" if close else "choose one of these",
    )


def check_values(measure: Measure, name: str, values: object, table: str, cores: Cores) -> Array:
    """Return the values of one column of `table` that a measure made of `cores`.

    Raises:
        InputError: The measure does not give what it declares.
    """
    expected: tuple[int, ...] = (len(cores),)
    if table == "factors":
        expected = (len(cores), cores.num_factors)
    elif table == "links":
        expected = (len(cores), cores.num_factors - 1)
    got = np.asarray(values[name], dtype=np.float64) if isinstance(values, Mapping) and name in values else None
    if got is None or got.shape[: len(expected)] != expected:
        raise InputError(
            f"measure {measure.name}",
            expected=f"{name} of shape {expected} and one more axis for lists",
            got="nothing" if got is None else f"shape {got.shape}",
            do="correct its function",
        )
    return got


def measure_columns(table: Table | None = None) -> tuple[Column, ...]:
    """Return the columns that measures, and runs of synthetic maps, fill in, of `table` or of all."""
    columns = [column for found in all_measures().values() for column in found.columns]
    return tuple(
        column for column in [*columns, *NOISE_COLUMNS, *MAP_COLUMNS] if table is None or column.table == table
    )
