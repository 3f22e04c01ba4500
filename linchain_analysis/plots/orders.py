"""Figure: how large each order of a step is, one panel for each method."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from linchain_analysis.analysis.comparisons import require_one_condition
from linchain_analysis.analysis.methods import sort_methods
from linchain_analysis.analysis.orders import measure_order_ratios
from linchain_analysis.analysis.trajectories import choose_window, count_steps, trajectories
from linchain_analysis.errors import InputError
from linchain_analysis.plots.content import define_columns, describe_bands, limit_view
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.style import (
    BLACK,
    BLUE,
    DASHES,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    WIDTHS,
    MethodStyle,
    paper_style,
)

if TYPE_CHECKING:
    from linchain_analysis.analysis import RunSet

_STYLES = tuple(
    MethodStyle(color, dash)
    for color, dash in zip((BLACK, BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY), DASHES, strict=False)
)
_MOST_COLUMNS = 4
_MEANING = (
    "Size of each order of the update of ΔW: ‖C_k‖/‖dΔW‖, C_k the part in which k of the n + 2 factors stand with "
    "their update; mean over modules where ΔW moved. The orders sum to the update, their sizes need not sum to 1. None "
    "depends on the gauge. Zeros have no place on the logarithmic axis."
)


def plot_orders(runs: RunSet, *, width: float = WIDTHS["icml-page"]) -> Drawn:
    """Draw the size of each order of a step: geometric mean over seeds with a 95 % t interval, a panel per method.

    Args:
        runs: Runs of one problem, each method at one learning rate, that recorded orders (preset `full`).
        width: In inches.

    Raises:
        InputError: No run recorded orders, a method stands at several problems or learning rates, or a chain has more
            factors than there are styles.
    """
    ratios = measure_order_ratios(runs)
    window = choose_window(count_steps(ratios))
    table = trajectories(ratios, "order_ratio", by=["order"], window=window, scale="log")
    table.insert(0, "quantity", "order_ratio")
    require_one_condition(table)
    methods, orders = sort_methods(table["method"]), sorted(table["order"].unique())
    if len(orders) > len(_STYLES):
        raise InputError(
            "plot_orders", expected=f"at most {len(_STYLES)} orders", got=str(len(orders)), do="draw shorter chains"
        )
    styles = dict(zip(orders, _STYLES, strict=False))
    columns = min(len(methods), _MOST_COLUMNS)
    rows = math.ceil(len(methods) / columns)
    low, high, _ = limit_view(table, "log")
    with paper_style():
        figure = Figure(figsize=(width, 1.9 * rows + 0.25), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for place, axes in enumerate(grid.flat):
            if place >= len(methods):
                axes.set_visible(False)
                continue
            axes.set_title(methods[place], pad=3)
            axes.set_yscale("log", nonpositive="mask")
            axes.set_ylim(low, high)
            for order, style in styles.items():
                curve = table[(table["method"] == methods[place]) & (table["order"] == order)].sort_values("step")
                _draw_curve(axes, curve, style)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_locator(LogLocator(numticks=8))
            axes.yaxis.set_minor_formatter(NullFormatter())
            if place + columns >= len(methods):
                axes.xaxis.set_tick_params(labelbottom=True)
                axes.set_xlabel("optimiser step")
        for axes in grid[:, 0]:
            axes.set_ylabel(r"$\Vert C_k\Vert\,/\,\Vert d\Delta W\Vert$")
        handles = [
            Line2D([], [], color=style.color, linestyle=style.linestyle, label=f"order {order}")
            for order, style in styles.items()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.4)
    caption = " ".join([_MEANING, *describe_bands(table, "log")])
    return Drawn(figure, table, caption, define_columns("modules", ["step", "module", "order_ratios"]))


def _draw_curve(axes: Axes, curve: pd.DataFrame, style: MethodStyle) -> None:
    axes.fill_between(curve["step"], curve["low"], curve["high"], color=style.color, alpha=0.16, linewidth=0)
    axes.plot(curve["step"], curve["mean"], color=style.color, linestyle=style.linestyle)
