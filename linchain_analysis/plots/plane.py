"""Figure: the path of ΔW in the plane of shear and rotation, over the smallest loss that each point allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator
from numpy.typing import ArrayLike, NDArray

from linchain_analysis.analysis.plane import Order, locate, smallest_losses
from linchain_analysis.errors import InputError
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.style import WIDTHS, MethodStyle, assign_styles, paper_style

MAX_COLUMNS = 4
_WHOLE_TURN = (-180.0, 180.0)
_MARGIN = 0.12
# Share of the runs that may leave the axis of shears at either end: k has no bound, and a view needs one.
_FEW_OUTSIDE = 0.15
_LEVELS = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
# Light greys alone: colours belong to the methods.
_GREYS = LinearSegmentedColormap.from_list("greys", ["#FFFFFF", "#D2D2D2"])
_MARK_SIZES = {"*": 9, "D": 4.5}
Floats = NDArray[np.float64]
_MEANING = {
    "shear-rotation": "ΔW = S(k) D R(θ), sheared first and rotated then",
    "rotation-shear": "ΔW = R(θ) D S(k), rotated first and sheared then",
}


def plot_plane(
    paths: pd.DataFrame,
    target: ArrayLike,
    *,
    order: Order = "shear-rotation",
    panel: str | None = None,
    width: float = WIDTHS["icml-page"],
) -> Drawn:
    """Draw paths of ΔW: a line for each run, in panels that share their axes.

    Args:
        paths: What `analysis.plane.follow` returned, in the same `order`.
        target: T, (2, 2).
        order: Of shear and rotation.
        panel: Column of `paths` with a title for each panel, in the order in which they first stand; one panel if
            unset.
        width: In inches.

    Raises:
        InputError: No path.
    """
    if paths.empty:
        raise InputError("plot_plane", expected="paths", got="none", do="pass what follow returns")
    marks = {"*": np.asarray(target, dtype=np.float64), "D": _keep_largest(target)}
    view = _choose_view(paths, list(marks.values()), order)
    titles = [""] if panel is None else list(dict.fromkeys(paths[panel]))
    styles = assign_styles(paths["method"])
    columns = min(len(titles), MAX_COLUMNS)
    num_rows = math.ceil(len(titles) / columns)
    with paper_style():
        size = (width, 0.5 + num_rows * min(2.3, 0.25 + 0.85 * width / columns))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(num_rows, columns, sharex=True, sharey=True, squeeze=False)
        filled = None
        for place, axes in enumerate(grid.flat):
            if place >= len(titles):
                axes.set_visible(False)
                continue
            own = paths if panel is None else paths[paths[panel] == titles[place]]
            filled = _draw_contours(axes, target, order, view)
            _draw_paths(axes, own, styles)
            for marker, matrix in marks.items():
                _mark(axes, marker, matrix, order)
            axes.set_title(titles[place], pad=3)
            axes.set_xlim(*view[0])
            axes.set_ylim(*view[1])
            axes.xaxis.set_major_locator(MultipleLocator(90 if view[0] == _WHOLE_TURN else 30))
            axes.grid(visible=False)
            if place + columns >= len(titles):
                axes.xaxis.set_tick_params(labelbottom=True)
                axes.set_xlabel(r"angle $\theta$ (degrees)")
        for axes in grid[:, 0]:
            axes.set_ylabel("shear $k$")
        assert filled is not None
        bar = figure.colorbar(filled, ax=grid, label="smallest relative loss", aspect=30, pad=0.01)
        shown = _LEVELS[1::2]
        bar.set_ticks(_colour_of(shown).tolist(), labels=[f"{level:g}" for level in shown])
        handles = _list_handles(styles)
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles) // 2, columnspacing=1.4)
    table = paths[[*([] if panel is None else [panel]), *(name for name in paths if name != panel)]]
    return Drawn(figure, table.reset_index(drop=True), _caption(paths, order, view[1], target, panel), ())


def _keep_largest(target: ArrayLike) -> Floats:
    """Return the nearest matrix of rank 1: its largest singular value with its two directions."""
    left, sigma, right = np.linalg.svd(np.asarray(target, dtype=np.float64))
    return np.asarray(sigma[0] * np.outer(left[:, 0], right[0]))


def _choose_view(
    paths: pd.DataFrame, matrices: Sequence[Floats], order: Order
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return limits of both axes that hold the marked matrices and nearly all of the paths."""
    marked = locate(np.stack(matrices), order)
    known = np.isfinite(marked.angle)
    angles = np.concatenate([_into_turn(paths["angle"]), np.degrees(marked.angle[known])])
    low, high = _widen(angles.min(), angles.max())
    whole = low < _WHOLE_TURN[0] or high > _WHOLE_TURN[1]
    ends = paths.groupby("run", observed=True)["shear"].agg(["min", "max"])
    bounds = [ends["min"].quantile(_FEW_OUTSIDE), ends["max"].quantile(1 - _FEW_OUTSIDE)]
    shears = np.concatenate([bounds, marked.shear[known]])
    return (_WHOLE_TURN if whole else (low, high)), _widen(shears.min(), shears.max())


def _widen(low: float, high: float) -> tuple[float, float]:
    margin = _MARGIN * (high - low if high > low else 1.0)
    return float(low - margin), float(high + margin)


def _colour_of(losses: ArrayLike) -> Floats:
    """Place losses on [0, 1], with the levels at equal distances: the colours then say where the loss is flat."""
    kept = np.maximum(np.asarray(losses, dtype=np.float64), _LEVELS[0])
    return np.interp(np.log(kept), np.log(_LEVELS), np.linspace(0, 1, len(_LEVELS)))


def _draw_contours(
    axes: Axes, target: ArrayLike, order: Order, view: tuple[tuple[float, float], tuple[float, float]]
) -> QuadContourSet:
    angles, amounts = np.linspace(*view[0], 241), np.linspace(*view[1], 201)
    size = (np.asarray(target, dtype=np.float64) ** 2).sum() / 2
    place = _colour_of(smallest_losses(target, np.radians(angles)[None], amounts[:, None], order) / size)
    levels = np.linspace(0, 1, len(_LEVELS))
    filled = axes.contourf(angles, amounts, place, levels=levels, cmap=_GREYS, zorder=0)
    axes.contour(angles, amounts, place, levels=levels, colors="#A0A0A0", linewidths=0.35, zorder=0.5)
    return filled


def _draw_paths(axes: Axes, paths: pd.DataFrame, styles: Mapping[str, MethodStyle]) -> None:
    for method, style in styles.items():
        own = paths[paths["method"] == method]
        for _, run in own.groupby("run", sort=False, observed=True):
            x, y = _wrap(run["angle"].to_numpy(), run["shear"].to_numpy())
            axes.plot(x, y, color=style.color, linestyle=style.linestyle, linewidth=0.9, alpha=0.9, zorder=2)
            first, last = run.iloc[0], run.iloc[-1]
            ends: dict[str, Any] = {"color": style.color, "linestyle": "none", "zorder": 5}
            axes.plot(_into_turn(first["angle"]), first["shear"], marker="o", markersize=3, fillstyle="none", **ends)
            axes.plot(_into_turn(last["angle"]), last["shear"], marker="s", markersize=2.4, **ends)


def _mark(axes: Axes, marker: str, matrix: Floats, order: Order) -> None:
    found = locate(matrix, order)
    axes.plot(
        np.degrees(found.angle),
        found.shear,
        marker=marker,
        markersize=_MARK_SIZES[marker],
        color="#FFFFFF",
        markeredgecolor="#000000",
        markeredgewidth=0.7,
        linestyle="none",
        zorder=4,
    )


def _list_handles(styles: Mapping[str, MethodStyle]) -> list[Line2D]:
    """Methods in one row and marks in another: a legend is filled column by column."""
    lines = [Line2D([], [], color=s.color, linestyle=s.linestyle, label=method) for method, s in styles.items()]
    plain: dict[str, Any] = {"linestyle": "none", "color": "#000000"}
    hollow: dict[str, Any] = {**plain, "markerfacecolor": "#FFFFFF", "markeredgewidth": 0.7}
    marks = [
        Line2D([], [], marker="o", fillstyle="none", markersize=3, label="after step 1", **plain),
        Line2D([], [], marker="s", markersize=2.4, label="end", **plain),
        Line2D([], [], marker="*", markersize=_MARK_SIZES["*"], label="target", **hollow),
        Line2D([], [], marker="D", markersize=_MARK_SIZES["D"], label="nearest of rank 1", **hollow),
    ]
    blank = Line2D([], [], linestyle="none", label=" ")
    return [handle for pair in zip_longest(lines, marks, fillvalue=blank) for handle in pair]


def _into_turn(angle: ArrayLike) -> Floats:
    """Bring degrees into [−180, 180)."""
    return np.asarray((np.asarray(angle, dtype=np.float64) + 180) % 360 - 180)


def _wrap(angle: Floats, shear: Floats) -> tuple[Floats, Floats]:
    """Bring a continued path into one turn: where it leaves at one side it goes on at the other."""
    turned = _into_turn(angle)
    leaps = np.flatnonzero(np.abs(np.diff(turned)) > 180) + 1
    return np.insert(turned, leaps, np.nan), np.insert(shear, leaps, np.nan)


def _caption(
    paths: pd.DataFrame, order: Order, shears: tuple[float, float], target: ArrayLike, panel: str | None
) -> str:
    keys = ["method", *([] if panel is None else [panel])]
    counts = paths.groupby(keys, observed=True)["run"].nunique()
    low, high = counts.min(), counts.max()
    outside = ~paths["shear"].between(*shears)
    runs_outside = paths.loc[outside].groupby(keys, observed=True)["run"].nunique().sum()
    truth = locate(target, order)
    sentences = [
        f"Paths of ΔW in the plane of shear and rotation: {_MEANING[order]}, D = diag(a, b) free, with "
        "R(θ) = [[cos θ, sin θ], [−sin θ, cos θ]] and S(k) = [[1, 0], [k, 1]], row vectors.",
        "Contours: the smallest ‖ΔW − T‖² / ‖T‖² over both entries of D, so that a path may stand over a smaller "
        "value than its own loss, and its loss falls while it rests, as D grows.",
        f"Star: the target, θ = {np.degrees(float(truth.angle)):.0f}°, k = {float(truth.shear):.2g}; "
        "diamond: its nearest matrix of rank 1.",
        "ΔW = 0, where training starts, has neither angle nor shear: a path begins (circle) after the first step; "
        "square: its end.",
        f"Each line is one run, {low} per method and panel."
        if low == high
        else f"Each line is one run, {low} to {high} per method and panel.",
    ]
    if outside.any():
        sentences.append(f"{runs_outside} of {counts.sum()} runs leave the range of shears that is drawn at some step.")
    return " ".join(sentences)
