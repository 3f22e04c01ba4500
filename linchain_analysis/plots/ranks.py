"""Figure: how many directions the weight change uses, over steps, by three measures side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from linchain_analysis.analysis.caveats import list_caveats
from linchain_analysis.analysis.ranks import measure_ranks
from linchain_analysis.analysis.trajectories import trajectories
from linchain_analysis.plots.content import (
    Content,
    NoValuesError,
    define_columns,
    describe_bands,
    label_axis,
    require_curves,
)
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.panels import draw_content
from linchain_analysis.plots.style import WIDTHS

if TYPE_CHECKING:
    from linchain_analysis.analysis import RunSet

_TITLES = {
    "effective_rank": r"effective rank ($p_i \propto \sigma_i$)",
    "effective_rank_squared": r"effective rank ($p_i \propto \sigma_i^2$)",
    "stable_rank": r"stable rank ($\Sigma\sigma^2/\sigma_1^2$)",
}
_MEANING = (
    "Rank of the weight change ΔW, mean over modules. Left: effective rank exp(−Σ p ln p) with p = σ/Σσ, which weighs "
    "the tail of the spectrum; middle: the same with p = σ²/Σσ²; right: stable rank Σσ²/σ₁². None depends on the "
    "gauge. Modules where ΔW = 0 have no rank and are left out."
)


def plot_effective_rank(runs: RunSet, *, width: float | None = None) -> Drawn:
    """Draw the effective rank of delta, and beside it two ranks that weigh the tail of the spectrum less.

    Args:
        runs: Runs of one problem, each method at one learning rate.
        width: In inches; a page of ICML if unset.

    Raises:
        InputError: If no run stored spectra, or a method stands at several problems or learning rates.
    """
    return draw_content(prepare_effective_rank(runs), width)


def prepare_effective_rank(runs: RunSet) -> Content:
    """Compute what `plot_effective_rank` draws."""
    ranks = measure_ranks(runs)
    parts = []
    for name in _TITLES:
        part = trajectories(ranks, name)
        part.insert(0, "panel", name)
        part.insert(0, "quantity", name)
        parts.append(part)
    table = pd.concat(parts, ignore_index=True)
    if ranks.empty and runs.read("modules", columns=["spectrum"])["spectrum"].notna().any():
        raise NoValuesError(
            "effective-rank",
            expected="ΔW other than 0 at one recorded step or more",
            got="ΔW = 0 throughout, which has no rank",
            do="draw the other figures, or runs that learn something",
        )
    require_curves("effective-rank", table, "track with preset `standard` or `full`, since `light` stores no spectra")
    caveats = list_caveats(ranks, table[table["panel"] == "effective_rank"])
    return Content(
        name="effective-rank",
        table=table,
        titles=_TITLES,
        label=label_axis("rank of ΔW", "modules", "effective_rank"),
        scale="linear",
        sentences=(_MEANING, *describe_bands(table, "linear"), *caveats),
        columns=define_columns("modules", ["step", "module", "spectrum", "effective_rank", "stable_rank"]),
        width=WIDTHS["icml-page"],
        panel_height=2.0,
    )
