"""What a figure shows, before anything is drawn: a tidy table of curves, and the words around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from linchain_analysis.analysis.comparisons import require_one_condition
from linchain_analysis.analysis.methods import sort_methods
from linchain_analysis.analysis.replication import Scale
from linchain_analysis.errors import InputError
from linchain_analysis.vocabulary import NATS, Column, define_column

# How far a band may widen the axis beyond the curves, in spans of the curves: with two seeds the t interval is 9
# standard deviations to either side, and an axis that held it would show a flat line.
_BAND_SHARE = 0.3


@dataclass(frozen=True)
class Content:
    """Curves in panels that share their axes.

    Attributes:
        name: Name of the figure, `effective-rank`.
        table: What is drawn: `quantity panel problem method base_learning_rate step mean low high num_seeds num_finite
            interval window`.
        titles: Title of each panel in `table`, in order; an empty title is not written.
        label: Label of the y axis, with its unit.
        scale: Of the y axis.
        sentences: The caption: what is shown first, then how it was averaged, then caveats.
        columns: Definitions of the columns it was computed from.
        width: Of a figure of its own, in inches.
        panel_height: Of a row of panels there, in inches.
    """

    name: str
    table: pd.DataFrame
    titles: dict[str, str]
    label: str
    scale: Scale
    sentences: tuple[str, ...]
    columns: tuple[Column, ...]
    width: float
    panel_height: float

    @property
    def methods(self) -> list[str]:
        """Methods with a curve, in the order of every legend."""
        return sort_methods(self.table["method"])

    @property
    def view(self) -> tuple[float, float]:
        """Limits of the y axis."""
        return limit_view(self.table, self.scale)[:2]


class NoValuesError(InputError):
    """A figure that has nothing to draw, since its column holds no finite value."""


def require_curves(name: str, table: pd.DataFrame, do: str) -> None:
    """Refuse a table that would draw nothing, or several conditions of one method.

    Raises:
        NoValuesError: Without a finite value; as every refusal of these with `name` of the figure as its place.
        InputError: With several conditions.
    """
    if table.empty or not np.isfinite(table["mean"]).any():
        raise NoValuesError(name, expected="finite values at one step or more", got="none", do=do)
    require_one_condition(table)


def limit_view(table: pd.DataFrame, scale: Scale) -> tuple[float, float, bool]:
    """Return the limits of a y axis that shows every mean, and whether they cut a band."""
    means, lows, highs = (_on_scale(table[name], scale) for name in ("mean", "low", "high"))
    bottom, top = means.min(), means.max()
    span = top - bottom if top > bottom else max(abs(top), 1.0) * 0.1
    reach = _BAND_SHARE * span
    low, high = lows.min(initial=bottom), highs.max(initial=top)
    below = scale == "log" and bool((table["low"] <= 0).any())  # a band that reaches where the axis cannot
    cut = below or bool(low < bottom - reach or high > top + reach)
    low = bottom - reach if below else low
    margin = 0.04 * span
    limits = max(low, bottom - reach) - margin, min(high, top + reach) + margin
    lower, upper = (10.0**limit if scale == "log" else limit for limit in limits)
    return float(lower), float(upper), cut


def describe_bands(table: pd.DataFrame, scale: Scale) -> list[str]:
    """Return the sentences on lines, bands and smoothing."""
    mean = "geometric mean" if scale == "log" and "logarithm" in table["interval"].iloc[0] else "mean"
    units = "runs" if table["interval"].str.contains("runs").any() else "seeds"
    counts = table.groupby("method")["num_seeds"].max()
    if counts.nunique() == 1:
        told = f"{counts.iloc[0]} per method"
    else:
        told = ", ".join(f"{method}: {counts[method]}" for method in sort_methods(counts.index))
    sentences = [f"Lines: {mean} over {units} ({told})."]
    if (counts > 1).any():
        sentences.append(f"Bands: {' and '.join(table['interval'].unique())}; the unit of replication is the seed.")
        if units == "runs":
            sentences[-1] = f"Bands: {' and '.join(table['interval'].unique())}."
        if limit_view(table, scale)[2]:
            sentences.append("Bands are cut at the panel's edge where they would dwarf the curves.")
    else:
        sentences.append(f"One of the {units} allows no band.")
    window = int(table["window"].max())
    if window > 1:
        sentences.append(f"Each run is smoothed by the mean of its last {window} recorded values before averaging.")
    return sentences


def define_columns(table: str, names: Sequence[str], loss_unit: str = NATS) -> tuple[Column, ...]:
    """Return the definitions of `names` in `table`, from the vocabulary, for runs whose loss has that unit."""
    return tuple(column for name in names if (column := define_column(table, name, loss_unit)) is not None)


def label_axis(words: str, table: str, column: str, loss_unit: str = NATS) -> str:
    """Return `words (unit)`, with the unit that the vocabulary gives the column."""
    definition = define_column(table, column, loss_unit)
    return label_unit(words, "" if definition is None else definition.unit)


def label_unit(words: str, unit: str) -> str:
    """Return `words (unit)`; a pure number has no unit, and words that end their line have it below."""
    if unit in ("", "1"):
        return words.strip()
    return f"{words}({unit})" if words.endswith("\n") else f"{words} ({unit})"


def _on_scale(values: pd.Series, scale: Scale) -> NDArray[np.float64]:
    array: NDArray[np.float64] = values.to_numpy(dtype=np.float64)
    array = array[np.isfinite(array) & ((array > 0) | (scale == "linear"))]
    if scale == "log":
        array = np.log10(array)
    return array
