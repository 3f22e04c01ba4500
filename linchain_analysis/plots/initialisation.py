"""Figure: conditioning, effective rank and scale of A W1 … Wn as it starts, over the number of inner factors."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from linchain_analysis.analysis.initialisation import summarise_initial_chains
from linchain_analysis.errors import InputError
from linchain_analysis.method_names import UNIFORM_GAINS
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.style import (
    BLUE,
    DASHES,
    GREEN,
    ORANGE,
    SKY,
    SOLID,
    VERMILION,
    WIDTHS,
    MethodStyle,
    paper_style,
)

_ROWS = {
    "condition_number": r"condition number $\sigma_1/\sigma_\mathrm{min}$",
    "effective_rank_share": r"effective rank$\,/\,r$",
    "mean_square": r"mean of $\sigma_i^2$",
}
# Inits may lie on one curve (kaiming, he and lecun differ in scale alone): the thinner stands on the thicker line.
_STYLES = {
    "kaiming": (MethodStyle(BLUE, SOLID), 2.6),
    "he": (MethodStyle(ORANGE, DASHES[1]), 1.7),
    "lecun": (MethodStyle(VERMILION, DASHES[7]), 1.7),
    "orthogonal": (MethodStyle(GREEN, SOLID), 2.6),
    "identity": (MethodStyle(SKY, DASHES[2]), 1.4),
}
_SAME = 0.01  # relative, where bands cannot be told apart; rounding is 1e-3 of a condition number of 1e13
_ROW_HEIGHT, _LEGEND_HEIGHT = 1.45, 0.25
_MEANING = (
    "Singular values σ of L = A W1 … Wn as the adapters start it, over the number n of inner factors; n = 0 is LoRA. "
    "Top: condition number, middle: effective rank exp(−Σ p ln p) with p = σ/Σσ, divided by r, bottom: mean of σ². "
    "At the start gradient descent moves ΔW by −lr · scale² · L Lᵀ G, so the condition number of that step's map is "
    "the square of what is drawn. L depends on the gauge; draws of it are compared at one gauge, the initial one."
)


def plot_initialisation(table: pd.DataFrame, *, width: float = WIDTHS["icml-page"]) -> Drawn:
    """Draw condition number, effective rank and mean σ² over chain length: a row each, a column for each rank.

    Lines are medians over draws, bands hold nine of ten draws.

    Args:
        table: What `analysis.initialisation.measure_initial_chains` returned.
        width: In inches.

    Raises:
        InputError: An empty table, or an init that has no style.
    """
    unknown = sorted(set(table["init"]) - _STYLES.keys())
    if table.empty or unknown:
        raise InputError(
            "plot_initialisation",
            expected=f"draws of {', '.join(_STYLES)}",
            got=", ".join(unknown) or "an empty table",
            do="pass what measure_initial_chains returns",
        )
    shared = table.assign(effective_rank_share=table["effective_rank"] / table["rank"])
    drawn = summarise_initial_chains(shared, list(_ROWS))
    settings = drawn[["rank", "chain_width"]].drop_duplicates().sort_values(["rank", "chain_width"])
    panels = [(int(rank), int(between)) for rank, between in settings.itertuples(index=False)]
    inits = [init for init in _STYLES if init in set(drawn["init"])]
    with paper_style():
        size = (width, _ROW_HEIGHT * len(_ROWS) + _LEGEND_HEIGHT)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(_ROWS), len(panels), sharex=True, sharey="row", squeeze=False)
        for row, (quantity, label) in enumerate(_ROWS.items()):
            grid[row, 0].set_ylabel(label)
            for axes, panel in zip(grid[row], panels, strict=True):
                here = (
                    (drawn["quantity"] == quantity) & (drawn["rank"] == panel[0]) & (drawn["chain_width"] == panel[1])
                )
                _draw_panel(axes, drawn[here], inits, logarithmic=quantity != "effective_rank_share")
        for axes, (rank, between) in zip(grid[0], panels, strict=True):
            axes.set_title(f"$r = {rank}$" if rank == between else f"$r = {rank}$, width {between}", pad=3)
        for axes in grid[-1]:
            axes.set_xlabel("number of inner factors $n$")
        handles = [
            Line2D([], [], color=style.color, linestyle=style.linestyle, linewidth=line_width, label=init)
            for init, (style, line_width) in _STYLES.items()
            if init in inits
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.4)
    return Drawn(figure, drawn, _caption(table, drawn), ())


def _draw_panel(axes: Axes, table: pd.DataFrame, inits: list[str], *, logarithmic: bool) -> None:
    if logarithmic:
        axes.set_yscale("log")
    filled: list[pd.DataFrame] = []
    for init in inits:
        style, line_width = _STYLES[init]
        curve = table[table["init"] == init].sort_values("chain_length")
        lengths, band = curve["chain_length"], curve[["low", "high"]].reset_index(drop=True)
        # Bands that lie on one another would mix into a colour that no line has.
        if not any(np.allclose(band, other, rtol=_SAME) for other in filled if band.shape == other.shape):
            axes.fill_between(lengths, curve["low"], curve["high"], color=style.color, alpha=0.16, linewidth=0)
            filled.append(band)
        axes.plot(
            lengths,
            curve["median"],
            color=style.color,
            linestyle=style.linestyle,
            linewidth=line_width,
            zorder=3 - line_width / 10,
        )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if logarithmic:
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.04)


def _caption(table: pd.DataFrame, drawn: pd.DataFrame) -> str:
    counts = sorted(drawn["num_draws"].unique())
    told = " to ".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]]))
    d_in, seeds = (", ".join(str(value) for value in sorted(table[name].unique())) for name in ("d_in", "seed"))
    sentences = [
        _MEANING,
        f"Lines: median over {told} draws (d_in = {d_in}, seed {seeds}).",
        "Bands: 5 % to 95 % quantile of single draws, no interval of the median.",
    ]
    uniform = [init for init in UNIFORM_GAINS if init in set(table["init"])]
    if len(uniform) > 1:
        sentences.append(f"{', '.join(uniform)} differ in scale alone, and so share the curves of the first two rows.")
    return " ".join(sentences)
