"""Draw curves with bands into panels that share their axes, and the legend above them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from linchain_analysis.plots.content import Content
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.style import DISC, MethodStyle, assign_styles, paper_style
from linchain_analysis.plots.ticks import tick_logarithmic

MAX_COLUMNS = 5
_FEW_STEPS = 25  # up to so many are each marked: a line between two samples alone would pass for a trend
_LEGEND_ENTRY_INCHES = 1.35  # at least, for names in one figure to stand where they do in another
_LEGEND_LINE_INCHES, _CHARACTER_INCHES = 0.68, 0.058
_MARK_EVERY = 0.22  # of the panel's diagonal, along a curve whose method has a marker of its own


def draw_content(content: Content, width: float | None = None) -> Drawn:
    """Draw one content as a figure of its own.

    Args:
        content: What to draw.
        width: Of the figure, in inches; the content's own if unset.
    """
    width = content.width if width is None else width
    styles = assign_styles(content.methods)
    with paper_style():
        height = content.panel_height * count_rows(content) + legend_height(styles, width)
        figure = Figure(figsize=(width, height), layout="constrained")
        draw_panels(figure, content, styles)
        draw_legend(figure, styles, width)
    return Drawn(figure, content.table, " ".join(content.sentences), content.columns)


def draw_panels(figure: Figure | SubFigure, content: Content, styles: Mapping[str, MethodStyle]) -> None:
    """Draw the panels of `content` into `figure`, in rows of at most `MAX_COLUMNS`."""
    rows = count_rows(content)
    columns = math.ceil(len(content.titles) / rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    low, high = content.view
    for axes, (panel, title) in zip(grid.flat, content.titles.items(), strict=False):
        axes.set_yscale(content.scale, **({"nonpositive": "mask"} if content.scale == "log" else {}))
        axes.set_ylim(low, high)
        draw_curves(axes, content.table[content.table["panel"] == panel], styles)
        axes.set_title(title, pad=3)
        _tick(axes, content)
    for place, axes in enumerate(grid.flat):
        if place >= len(content.titles):
            axes.set_visible(False)
        # A panel above an empty place is the last of its column and carries the numbers.
        elif place + columns >= len(content.titles):
            axes.xaxis.set_tick_params(labelbottom=True)
            axes.set_xlabel("optimiser step")
    for axes in grid[:, 0]:
        axes.set_ylabel(content.label, linespacing=1.0)


def draw_curves(axes: Axes, table: pd.DataFrame, styles: Mapping[str, MethodStyle], band: float = 0.16) -> None:
    """Draw line and band of every method in `table`; a value that is not finite leaves a gap.

    Args:
        axes: Where.
        table: What `trajectories` returned, of one panel.
        styles: By method.
        band: Opacity of the bands.
    """
    for method, style in styles.items():
        curve = table[table["method"] == method].sort_values("step")
        if curve.empty:
            continue
        marks: dict[str, Any] = style.mark(2.5) if curve["mean"].notna().sum() <= _FEW_STEPS else {}
        if not marks and style.marker != DISC:
            marks = {**style.mark(2.0), "markevery": _MARK_EVERY}
        low = curve["low"]
        if axes.get_yscale() == "log":
            # What lies at or below 0 is far below the panel, and without a place there would tear the band.
            low = low.mask(low <= 0, axes.get_ylim()[0] / 10)
        axes.fill_between(curve["step"], low, curve["high"], color=style.color, alpha=band, linewidth=0)
        axes.plot(
            curve["step"],
            curve["mean"],
            color=style.color,
            linestyle=style.linestyle,
            label=method,
            **marks,
        )


def draw_legend(figure: Figure, styles: Mapping[str, MethodStyle], width: float) -> None:
    """Draw one legend for the whole figure above its panels, as many methods in a row as `width` inches hold."""
    handles = [
        Line2D([], [], color=s.color, linestyle=s.linestyle, label=method, **(s.mark(2.0) if s.marker != DISC else {}))
        for method, s in styles.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=_legend_columns(styles, width), columnspacing=1.4)


def legend_height(styles: Mapping[str, MethodStyle], width: float) -> float:
    """Return the height in inches that `draw_legend` takes."""
    return 0.1 + 0.15 * math.ceil(len(styles) / _legend_columns(styles, width))


def count_rows(content: Content) -> int:
    """Return the number of rows in which the panels of `content` stand."""
    return math.ceil(len(content.titles) / MAX_COLUMNS)


def _legend_columns(styles: Mapping[str, MethodStyle], width: float) -> int:
    longest = max(map(len, styles), default=0)
    entry = max(_LEGEND_ENTRY_INCHES, _LEGEND_LINE_INCHES + _CHARACTER_INCHES * longest)
    fitting = max(1, min(len(styles), int(width / entry)))
    # Rows of equal length: 4 methods where 3 would fit are two rows of 2.
    return math.ceil(len(styles) / math.ceil(len(styles) / fitting))


def _tick(axes: Axes, content: Content) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=[1, 2, 5, 10]))
    if content.scale == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        return
    tick_logarithmic(axes.yaxis, *content.view)
