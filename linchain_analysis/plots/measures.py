"""Figure: one column that a measure recorded, over steps; whatever the measure is."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from linchain_analysis.analysis.replication import Scale, complete_labels
from linchain_analysis.analysis.trajectories import choose_window, count_steps, trajectories
from linchain_analysis.errors import InputError
from linchain_analysis.plots.columns import Drawable, list_drawables, refuse_unknown
from linchain_analysis.plots.content import Content, define_columns, describe_bands, label_unit, require_curves
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.norms import sort_factors
from linchain_analysis.plots.notes import describe_column, list_notes
from linchain_analysis.plots.panels import MAX_COLUMNS, draw_content
from linchain_analysis.plots.style import WIDTHS
from linchain_analysis.vocabulary import Column

if TYPE_CHECKING:
    from linchain_analysis.analysis import RunSet

MAX_ENTRIES = 3 * MAX_COLUMNS  # of a column of lists, one panel each
_DECADE, _SHARE_LIMIT = 10.0, 2.0
_KEYS = {"steps": [], "modules": ["module"], "factors": ["module", "factor"], "links": ["module", "link"]}
# What the entries of a list are, where its column says more than that they are entries.
_ENTRY_WORDS = {("modules", "order_ratios"): "order"}
# How many characters of a label stand beside one panel, a single one and one of several.
_LABEL_LENGTH = {True: 30, False: 22}


def plot_measure(runs: RunSet, name: str, *, width: float | None = None) -> Drawn:
    """Draw one column of `runs` over steps: mean over modules, then over seeds with a 95 % t interval.

    Columns of factors and of links have one panel for each of them, columns of lists one for each entry. A size that
    spans more than a decade is drawn on a logarithmic axis, as geometric mean over seeds.

    Args:
        runs: Runs of one problem, each method at one learning rate.
        name: Of the column, with `_` or with dashes.
        width: In inches; a column of ICML for one panel and a page for several if unset.

    Raises:
        InputError: There is no such column, it has no finite value, or a method stands at several problems or
            learning rates.
    """
    found = list_drawables(runs)
    asked = name.replace("_", "-")
    if asked not in found:
        raise refuse_unknown(asked, found, "plot_measure")
    return draw_content(prepare_measure(runs, found[asked], find_diverged(runs)), width)


def find_diverged(runs: RunSet) -> pd.DataFrame:
    """Return `run step module` where a factor is no longer finite: a value missing there is not one that is undefined.

    Modules whose factors were never finite, or never read, are not among them.
    """
    parts = [pd.DataFrame({"run": [], "step": [], "module": []}, dtype=object)]
    for run, name in zip(runs.runs, runs.names, strict=True):
        frame = run.read("factors", ["step", "module", "weight_norm"]).assign(run=name)
        finite = np.isfinite(frame["weight_norm"].to_numpy(dtype=np.float64))
        lost = frame[~finite & frame["module"].isin(frame.loc[finite, "module"])]
        parts.append(lost[["run", "step", "module"]].drop_duplicates().astype(object))
    return pd.concat(parts, ignore_index=True)


def prepare_measure(runs: RunSet, drawable: Drawable, diverged: pd.DataFrame) -> Content:
    """Compute what `plot_measure` draws.

    Args:
        runs: As `plot_measure` takes them.
        drawable: Which column.
        diverged: What `find_diverged` says of the runs.
    """
    column = drawable.column
    frame = _spread(complete_labels(_read(runs, drawable)), drawable)
    known = frame[~_is_undefined(frame, column.name, diverged)]
    window = choose_window(count_steps(known))
    table = trajectories(known, column.name, by=["panel"], window=window)
    require_curves(drawable.name, table, f"see when it is known: {column.meaning}")
    scale = choose_scale(column, known[column.name], table["mean"])
    if scale == "log":
        table = trajectories(known, column.name, by=["panel"], window=window, scale=scale)
    table.insert(0, "panel", table.pop("panel"))
    table.insert(0, "quantity", column.name)
    titles = _titles(table, column)
    definitions = define_columns(column.table, ["step", *_KEYS[column.table]])
    return Content(
        name=drawable.name,
        table=table,
        titles=titles,
        label=_label(column, single=len(titles) == 1),
        scale=scale,
        sentences=(
            describe_column(column),
            *describe_bands(table, scale),
            *list_notes(runs.names, frame, known, table, column),
        ),
        columns=(*definitions, column),
        width=WIDTHS["icml-column" if len(titles) == 1 else "icml-page"],
        panel_height=2.1 if len(titles) == 1 else 1.7,
    )


def choose_scale(column: Column, values: pd.Series, means: pd.Series) -> Scale:
    """Return the scale on which `means` over modules and seeds of `values` are drawn.

    Logarithmic for what is never negative and whose means span more than a decade, with two exceptions that are read
    on a linear axis: numbers of directions, and single numbers without a unit that stay below 2 (shares and ratios,
    of which some overshoot 1; cosines).
    """
    finite = means[np.isfinite(means)]
    positive = finite[finite > 0]
    # By every value, since no logarithm of a single negative one can be averaged.
    if column.unit == "directions" or positive.empty or values.min() < 0:
        return "linear"
    if column.unit in ("", "1") and column.kind != "values" and finite.max() < _SHARE_LIMIT:
        return "linear"
    return "log" if positive.max() > _DECADE * positive.min() else "linear"


def _read(runs: RunSet, drawable: Drawable) -> pd.DataFrame:
    """Rows of the runs that have the column, each under the name that it has among all."""
    column = drawable.column
    names = ["step", *_KEYS[column.table], column.name]
    parts = [
        runs.__class__([run]).read(column.table, names).assign(run=name)
        for run, name in zip(runs.runs, runs.names, strict=True)
        if name in drawable.runs
    ]
    return pd.concat(parts, ignore_index=True)


def _spread(frame: pd.DataFrame, drawable: Drawable) -> pd.DataFrame:
    """Give every row its panel, and every entry of a list its row."""
    column = drawable.column
    own = frame[column.table[:-1]].astype(str) if column.table in ("factors", "links") else None
    if column.kind not in ("spectrum", "values"):
        values = pd.to_numeric(frame[column.name]).astype("float64")
        return frame.assign(panel="all" if own is None else own).assign(**{column.name: values})
    lists = frame[column.name].dropna()
    lengths = lists.map(len).to_numpy(dtype=np.intp)
    longest = int(lengths.max(initial=0))
    if column.kind == "spectrum" or longest > MAX_ENTRIES:
        raise InputError(
            drawable.name,
            expected=f"single values, or lists of at most {MAX_ENTRIES}",
            got="spectra" if column.kind == "spectrum" else f"lists of {longest}",
            do=f'read them with load_run(…).read("{column.table}", ["{column.name}"])',
        )
    rows = lists.index.repeat(lengths)
    entries = pd.Series([str(entry) for length in lengths for entry in range(1, length + 1)], index=rows, dtype=object)
    spread = frame.loc[rows]
    panel = entries if own is None else own.loc[rows] + " " + entries
    entry_values = np.concatenate([*lists, []])
    return spread.assign(panel=panel).assign(**{column.name: entry_values}).reset_index(drop=True)


def _is_undefined(frame: pd.DataFrame, value: str, diverged: pd.DataFrame) -> pd.Series:
    """Where there is no value because none was taken or none is defined, and not because the module diverged."""
    missing: pd.Series = frame[value].isna()
    if diverged.empty or not missing.any():
        return missing
    keys = [key for key in ("run", "step", "module") if key in frame]
    lost = pd.MultiIndex.from_frame(diverged[keys].astype(object))
    return missing & ~pd.MultiIndex.from_frame(frame[keys].astype(object)).isin(lost)


def _titles(table: pd.DataFrame, column: Column) -> dict[str, str]:
    panels = set(table["panel"])
    if panels == {"all"}:
        return {"all": ""}
    return {panel: _title(panel, column) for panel in sorted(panels, key=_place)}


def _place(panel: str) -> list[int]:
    """Order from input to output of factors, of links by their ends, and of entries."""
    parts = re.split(r"[- ]", panel)
    order = sort_factors([*parts, "A", "B", *(f"W{number}" for number in range(1, 100))])
    return [int(part) if part.isdecimal() else order.index(part) for part in parts]


def _title(panel: str, column: Column) -> str:
    name, _, entry = panel.rpartition(" ")
    if column.kind != "values":
        name, entry = panel, ""
    typeset = " – ".join(re.sub(r"^([A-Z])(\d*)$", _typeset, part) for part in name.split("-")) if name else ""
    word = _ENTRY_WORDS.get((column.table, column.name), "entry")
    return ", ".join(part for part in (typeset, entry and f"{word} {entry}") if part)


def _typeset(found: re.Match[str]) -> str:
    return f"${found[1]}_{{{found[2]}}}$" if found[2] else f"${found[1]}$"


def _label(column: Column, single: bool) -> str:
    length = _LABEL_LENGTH[single]
    words = textwrap.fill(column.name.replace("_", " ").replace("$", r"\$"), length)
    unit = f" ({column.unit})" if column.unit not in ("", "1") else ""
    if unit and len(words.rpartition("\n")[2]) + len(unit) > length:
        words += "\n"
    return re.sub(r"\^\(([^)]+)\)", r"$^{\1}$", label_unit(words, column.unit))
