"""Figure: every cost over its target, and how the tracker's time grows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from linchain_analysis.analysis.provenance import describe_origin
from linchain_analysis.benchmarks.rows import Row
from linchain_analysis.errors import InputError
from linchain_analysis.plots import WIDTHS, Drawn, paper_style, save_figure
from linchain_analysis.plots.style import BLACK, BLUE, GREEN, VERMILION

NAME = "cost"
COLUMNS = ("panel", "name", "unit", "x", "median", "q25", "q75", "target", "met", "machine")
TARGETS = "over-target"
_AXES = {
    "modules": ("modules", BLACK, "o", "-"),
    "hidden": ("width", BLUE, "s", "--"),
    "rank": ("rank", GREEN, "^", ":"),
}


def draw_cost(rows: Sequence[Row], machine: str) -> Drawn:
    """Draw rows that have a target, as multiples of it, and beside them the points of growth.

    Args:
        rows: What was measured.
        machine: Where.

    Raises:
        InputError: If no row has a target or is a point of growth.
    """
    table = tabulate(rows, machine)
    if table.empty:
        raise InputError(
            "--figures", expected="rows with a target or points of growth", got="none", do="measure another topic"
        )
    panels = [panel for panel in (TARGETS, "growth") if (table["panel"] == panel).any()]
    num_targets = int((table["panel"] == TARGETS).sum())
    with paper_style():
        height = max(2.2, 0.6 + 0.14 * num_targets)
        figure = Figure(figsize=(WIDTHS["icml-page"], height), layout="constrained")
        ratios = [1.0 if panel == TARGETS else 0.8 for panel in panels]
        grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=ratios)
        for axes, panel in zip(grid.flat, panels, strict=True):
            (_draw_targets if panel == TARGETS else _draw_growth)(axes, table[table["panel"] == panel])
    caption = (
        "Cost of tracking and of the adapters. Left: measured value over its target (1, the vertical line), median and "
        "quartiles over pairs of units measured in turns in one process; filled where the target is met. Right: "
        "milliseconds a step that the tracker (preset standard) takes, against the number of modules, their width and "
        f"their rank, each varied alone. Measured on: {machine}."
    )
    return Drawn(figure, table, caption, ())


def save_cost(rows: Sequence[Row], machine: str, folder: Path) -> Path:
    """Draw into `folder`/cost, or into `folder` if it is called so, and return where the figure lies."""
    home = folder if folder.name == NAME else folder / NAME
    origin = describe_origin(["python", "-m", "linchain_analysis.bench", *sys.argv[1:]], [])
    save_figure(draw_cost(rows, machine), home, {**origin, "machine": machine})
    return home


def tabulate(rows: Sequence[Row], machine: str) -> pd.DataFrame:
    """Return what is drawn: `COLUMNS`, one row a point; `x` is the value over its target, or the varied size."""
    points: list[dict[str, Any]] = []
    for row in rows:
        if row.median is None:
            continue
        shared = {
            "name": row.name,
            "unit": row.unit,
            "median": row.median,
            "q25": row.q25,
            "q75": row.q75,
            "target": row.target,
            "met": row.met,
            "machine": machine,
        }
        if row.target is not None:
            points.append({"panel": TARGETS, "x": row.median / row.target, **shared})
        if "axis" in row.extra:
            points.append({"panel": "growth", "x": float(row.extra["at"]), **shared})
    return pd.DataFrame(points, columns=list(COLUMNS))


def _draw_targets(axes: Axes, table: pd.DataFrame) -> None:
    places = np.arange(len(table))[::-1]
    axes.axvline(1.0, color=VERMILION, linewidth=0.8)
    lows, highs = table["q25"] / table["target"], table["q75"] / table["target"]
    for place, x, low, high, met in zip(places, table["x"], lows, highs, table["met"], strict=True):
        axes.plot([low, high], [place, place], color=BLACK, linewidth=0.9)
        axes.plot([x], [place], "o", markersize=3.2, color=BLACK, markerfacecolor=BLACK if met else "white")
    axes.set_xscale("log")
    _tick_sparsely(axes.xaxis)
    axes.set_yticks(places, list(table["name"]), fontsize=5.5)
    axes.set_xlabel("measured / target")


def _draw_growth(axes: Axes, table: pd.DataFrame) -> None:
    for axis, (label, color, marker, line) in _AXES.items():
        points = table[table["name"].str.startswith(f"growth/{axis}/")].sort_values("x")
        if points.empty:
            continue
        spread = [points["median"] - points["q25"], points["q75"] - points["median"]]
        axes.errorbar(
            points["x"], points["median"], yerr=spread, color=color, marker=marker, linestyle=line, markersize=3,
            elinewidth=0.8, label=label,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    _tick_sparsely(axes.yaxis)
    axes.set_xlabel("modules, width or rank")
    axes.set_ylabel("tracker (ms a step)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.0, handlelength=2.4)


def _tick_sparsely(axis: Axis) -> None:
    """Number 1, 2 and 5 of every decade: a logarithmic axis of less than two has too few powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
