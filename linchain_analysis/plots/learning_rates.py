"""Figure: methods over learning rates, at one rate for all, and each at its own best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from linchain_analysis.analysis.convergence import RELATIVE_LOSS, read_losses
from linchain_analysis.analysis.learning_rates import (
    RULE,
    at_rates,
    choose_common_rate,
    choose_rates,
    measure_rates,
)
from linchain_analysis.analysis.levels import choose_level, choose_loss_window
from linchain_analysis.analysis.methods import sort_methods
from linchain_analysis.analysis.ranks import measure_ranks
from linchain_analysis.analysis.replication import Scale
from linchain_analysis.analysis.trajectories import trajectories
from linchain_analysis.analysis.units import find_loss_unit
from linchain_analysis.errors import InputError
from linchain_analysis.plots.content import NoValuesError, define_columns, limit_view
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.panels import draw_curves, draw_legend, legend_height
from linchain_analysis.plots.style import WIDTHS, MethodStyle, assign_styles, paper_style
from linchain_analysis.plots.ticks import pad_limits, tick_logarithmic

if TYPE_CHECKING:
    from linchain_analysis.analysis import RunSet

_NUM_STEPS = 40  # at which a curve is drawn, evenly on the logarithmic axis of steps
_SMALLEST = 1e-6  # of a relative loss that is shown: what Adam does below is the unrest of its own steps
_OVER_RATES = ("median", "share", "final_loss")
_BAND = 0.1  # opacity: bands of many methods lie over each other here
_TOP_HEIGHT, _BOTTOM_HEIGHT = 1.75, 1.75


@dataclass(frozen=True)
class _Tuned:
    """What is drawn.

    Attributes:
        rates: What `measure_rates` returned.
        chosen: What `choose_rates` returned.
        common: The rate for all.
        curves: By part `d` … `g`, what `trajectories` returned.
    """

    column: str
    level: float
    window: int
    rates: pd.DataFrame
    chosen: pd.DataFrame
    common: float
    curves: dict[str, pd.DataFrame]


def plot_learning_rates(
    runs: RunSet, *, level: float | None = None, column: str | None = None, width: float = WIDTHS["icml-page"]
) -> Drawn:
    """Draw steps to a level of the loss and the final loss over learning rates, and curves at two choices of a rate.

    Args:
        runs: Runs of one problem at several learning rates.
        level: A loss to count steps to; `analysis.levels.choose_level` if unset.
        column: The loss; as `read_losses` takes it.
        width: In inches.

    Raises:
        InputError: Several problems, no rate that every method was run at, or nothing finite; as `NoValuesError` a
            loss that is 0 throughout, which has no place on a logarithmic axis.
    """
    tuned = _prepare(runs, level, column)
    styles = assign_styles(tuned.rates["method"])
    ranked = "f" in tuned.curves
    heights = (_TOP_HEIGHT, _BOTTOM_HEIGHT)
    with paper_style():
        figure = Figure(figsize=(width, sum(heights) + legend_height(styles, width)), layout="constrained")
        rows = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
        for row in rows:
            row.patch.set_visible(False)  # as in the overview: else one figure has two PDFs
        top = rows[0].subplots(1, 3, sharex=True)
        bottom = rows[1].subplots(1, 4 if ranked else 2, sharex=True)
        for axes, name in zip(top, _OVER_RATES, strict=True):
            _draw_over_rates(axes, tuned, name, styles)
        for axes, part in zip(bottom, ("defg" if ranked else "de"), strict=True):
            _draw_over_steps(axes, tuned, part, styles)
        for letter, axes in zip("abcdefg", [*top, *bottom], strict=False):
            axes.annotate(
                letter,
                (0, 1),
                xycoords="axes fraction",
                xytext=(-22, 4),
                textcoords="offset points",
                fontsize=10,
                fontweight="bold",
            )
        draw_legend(figure, styles, width)
    columns = define_columns("steps", ["step", tuned.column], find_loss_unit(runs)) + (
        define_columns("modules", ["spectrum", "effective_rank"]) if ranked else ()
    )
    return Drawn(figure, _join(tuned), " ".join(_describe(tuned)), columns)


def _prepare(runs: RunSet, level: float | None, column: str | None) -> _Tuned:
    losses, column = read_losses(runs, column)
    problems = losses["problem"].drop_duplicates()
    if len(problems) != 1:
        raise InputError(
            "learning-rates",
            expected="runs of one problem",
            got=", ".join(map(str, problems)) or "none",
            do="draw one figure for each",
        )
    if (losses[column] == 0).all():
        raise NoValuesError(
            "learning-rates",
            expected="a loss above 0 at some step",
            got=f"{_words(column)} 0 throughout",
            do="draw runs that have something to learn",
        )
    window = choose_loss_window(losses, column)
    level = choose_level(losses, column, window) if level is None else level
    rates = measure_rates(losses, level, column, window)
    chosen, common = choose_rates(rates), choose_common_rate(rates)
    best = dict(zip(chosen["method"], chosen["base_learning_rate"], strict=True))
    ranks = measure_ranks(runs)
    curves = {}
    for letters, rate_of in (("df", dict.fromkeys(best, common)), ("eg", best)):
        own = at_rates(losses, rate_of)
        curves[letters[0]] = trajectories(_thin(own), column, window=1, scale="log")
        if not ranks.empty:
            curves[letters[1]] = trajectories(at_rates(ranks, rate_of), "effective_rank")
    return _Tuned(column, level, window, rates, chosen, common, curves)


def _thin(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the steps that are drawn, and of every run its last."""
    last = int(frame["step"].max())
    kept = np.unique(np.round(np.geomspace(1, last, _NUM_STEPS)).astype(int))
    ends = frame.groupby("run", observed=True)["step"].transform("max")
    return frame[frame["step"].isin(kept) | (frame["step"] == ends)]


def _draw_over_rates(axes: Axes, tuned: _Tuned, name: str, styles: Mapping[str, MethodStyle]) -> None:
    axes.set_xscale("log", base=2)
    for method, style in styles.items():
        own = tuned.rates[tuned.rates["method"] == method].sort_values("base_learning_rate")
        x, share = own["base_learning_rate"].to_numpy(), (own["num_reached"] / own["num_seeds"]).to_numpy()
        y = share if name == "share" else own[name].to_numpy(dtype=np.float64)
        y = np.where(np.isfinite(y), y, np.nan)
        if name == "final_loss":
            y = np.maximum(y, _SMALLEST) if tuned.column == RELATIVE_LOSS else y
        axes.plot(x, y, color=style.color, linestyle=style.linestyle, label=method, **style.mark(2.2))
        if name == "median":
            best = tuned.chosen[(tuned.chosen["method"] == method) & np.isfinite(tuned.chosen["median"])]
            axes.plot(
                best["base_learning_rate"],
                best["median"],
                marker="o",
                markersize=5.5,
                fillstyle="none",
                color=style.color,
                linestyle="none",
                zorder=4,
            )
    axes.axvline(tuned.common, color="#808080", linewidth=0.6, linestyle=(0, (2, 2)), zorder=0)
    axes.set_xlabel("learning rate")
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if name == "share":
        axes.set_ylim(-0.04, 1.04)
        axes.set_ylabel("share of seeds")
        return
    axes.set_ylabel(f"steps to {tuned.level:.2g}" if name == "median" else f"final {_words(tuned.column)}")
    axes.set_yscale("log", nonpositive="mask")
    values = tuned.rates[name].to_numpy(dtype=np.float64)
    shown = values[np.isfinite(values) & (values > 0)]
    if not len(shown):
        axes.yaxis.set_major_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.text(0.5, 0.5, "at no rate by most seeds", transform=axes.transAxes, ha="center", va="center")
        return
    if name == "final_loss" and tuned.column == RELATIVE_LOSS:
        shown = np.maximum(shown, _SMALLEST)
    low, high = pad_limits(shown.min(), shown.max())
    axes.set_ylim(low, high)
    tick_logarithmic(axes.yaxis, low, high, num_powers=6)


def _draw_over_steps(axes: Axes, tuned: _Tuned, part: str, styles: Mapping[str, MethodStyle]) -> None:
    table = tuned.curves[part]
    scale: Scale = "log" if part in "de" else "linear"
    axes.set_xscale("log")
    axes.set_yscale(scale, **({"nonpositive": "mask"} if scale == "log" else {}))
    # The two choices of a rate are compared, so they share the view.
    both = pd.concat([tuned.curves[other] for other in ("de" if part in "de" else "fg")])
    shown = both[np.isfinite(both["mean"])]
    if part in "de" and tuned.column == RELATIVE_LOSS:
        shown = shown[shown["mean"] > _SMALLEST]
    if len(shown):
        low, high, _ = limit_view(shown, scale)
        axes.set_ylim(max(low, _SMALLEST) if part in "de" and tuned.column == RELATIVE_LOSS else low, high)
    draw_curves(axes, table, styles, band=_BAND)
    if part in "de":
        tick_logarithmic(axes.yaxis, *axes.get_ylim(), num_powers=6)
        axes.set_ylabel(_words(tuned.column))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.set_ylabel(r"effective rank of $\Delta W$")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("optimiser step")
    axes.set_title(f"all at {tuned.common:.2g}" if part in "df" else "each at its best", pad=3)


def _words(column: str) -> str:
    return "training loss" if column == "loss" else column.replace("_", " ")


def _join(tuned: _Tuned) -> pd.DataFrame:
    over_rates = tuned.rates.assign(part="a-c", chosen=_is_chosen(tuned))
    quantity = {"d": tuned.column, "e": tuned.column, "f": "effective_rank", "g": "effective_rank"}
    keep = ["problem", "method", "base_learning_rate", "step", "mean", "low", "high", "num_seeds", "num_finite"]
    curves = [table[keep].assign(part=part, quantity=quantity[part]) for part, table in tuned.curves.items()]
    whole = pd.concat([over_rates.assign(quantity=f"steps to {tuned.level!r} of {tuned.column}"), *curves])
    first = ["part", "quantity", "problem", "method", "base_learning_rate"]
    return whole[[*first, *(name for name in whole if name not in first)]].reset_index(drop=True)


def _is_chosen(tuned: _Tuned) -> pd.Series:
    best = dict(zip(tuned.chosen["method"], tuned.chosen["base_learning_rate"], strict=True))
    return tuned.rates["base_learning_rate"] == tuned.rates["method"].map(best)


def _describe(tuned: _Tuned) -> list[str]:
    counts = tuned.rates["num_seeds"]
    seeds = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    words = _words(tuned.column)
    sentences = [
        f"Learning rates. The unit of replication is the seed ({seeds} per method and rate).",
        f"(a) Steps until the {words} is at most {tuned.level:.3g}, median over seeds; a run that never gets there, or "
        "leaves the finite numbers, counts as slower than all others, so there is no point where half of the seeds or "
        "more do not. Ring: the rate chosen for a method.",
        "(b) Share of the seeds that get there. (c) "
        f"Median {words} at the last step, a run that left the finite numbers counting as infinite.",
        f"Dashed: the common rate, {tuned.common:.3g}, at which most runs of all methods get there, and soonest.",
        "(d, e) Geometric mean over seeds with the 95 % t interval of the logarithm"
        + ("; (f, g) mean with the 95 % t interval" if "f" in tuned.curves else "")
        + ", all at the common rate and each at its own.",
        f"A method's own rate is {RULE}; it is chosen on the seeds that are shown.",
    ]
    if tuned.window > 1:
        sentences.append(f"In (a) to (c) the loss is the mean of its last {tuned.window} values.")
    if tuned.column == RELATIVE_LOSS:
        sentences.append(f"Relative losses below {_SMALLEST:g} are cut off, in (c) drawn there.")
    if len(set(tuned.rates.groupby("method")["base_learning_rate"].apply(frozenset))) > 1:
        sentences.append("The methods were not run at the same rates.")
    return [*sentences, *_describe_choices(tuned.chosen)]


def _describe_choices(chosen: pd.DataFrame) -> list[str]:
    sentences = []
    edges = {edge: _list(chosen.loc[chosen["edge"] == edge, "method"]) for edge in ("smallest", "largest", "only")}
    for edge, methods in edges.items():
        if methods and edge != "only":
            sentences.append(f"At the {edge} rate of the grid, so that a better one may lie outside it: {methods}.")
    never = _list(chosen.loc[chosen["num_reached"] == 0, "method"])
    if never:
        sentences.append(f"No seed at any rate gets there, and the final loss decides: {never}.")
    tied = _list(chosen.loc[(chosen["num_tied"] > 0) & (chosen["num_reached"] > 0), "method"])
    if tied:
        sentences.append(f"Of several rates that are as good by seeds and steps, the final loss decides: {tied}.")
    told = ", ".join(f"{row.method} {row.base_learning_rate:.2g}" for row in chosen.itertuples())
    return [*sentences, f"Own rates: {told}."]


def _list(methods: pd.Series) -> str:
    return ", ".join(sort_methods(methods))
