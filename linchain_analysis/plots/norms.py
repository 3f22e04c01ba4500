"""Figures: gradient norms and update norms of each factor, over steps."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from linchain_analysis.analysis.caveats import list_caveats
from linchain_analysis.analysis.trajectories import choose_window, count_steps, trajectories
from linchain_analysis.analysis.units import find_loss_unit
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

_GAUGE = (
    "These norms depend on the gauge (W_i → W_i M, W_{i+1} → M⁻¹ W_{i+1}): they describe the factors and not the "
    "function that they make up. Zeros have no place on the logarithmic axis."
)


def plot_gradient_norms(runs: RunSet, *, width: float | None = None) -> Drawn:
    """Draw the gradient norm of each factor, one panel for each: geometric mean over seeds with a 95 % t interval.

    Args:
        runs: Runs of one problem, each method at one learning rate.
        width: In inches; a page of ICML if unset.

    Raises:
        InputError: If no run recorded factors, or a method stands at several problems or learning rates.
    """
    return draw_content(prepare_gradient_norms(runs), width)


def plot_update_norms(runs: RunSet, *, width: float | None = None) -> Drawn:
    """Draw the norm of each factor's update, as `plot_gradient_norms` draws gradients.

    Args:
        runs: Runs of one problem, each method at one learning rate.
        width: In inches; a page of ICML if unset.

    Raises:
        InputError: As `plot_gradient_norms`.
    """
    return draw_content(prepare_update_norms(runs), width)


def prepare_gradient_norms(runs: RunSet) -> Content:
    """Compute what `plot_gradient_norms` draws."""
    meaning = (
        "Frobenius norm of the gradient of each factor, from input (A) to output (B), before clipping; modules' mean."
    )
    return _prepare(runs, "grad_norm", "gradient-norms", "gradient norm", meaning)


def prepare_update_norms(runs: RunSet) -> Content:
    """Compute what `plot_update_norms` draws."""
    meaning = "Frobenius norm of the change of each factor in one optimiser step, mean over modules."
    return _prepare(runs, "update_norm", "update-norms", "update norm", meaning)


def sort_factors(factors: list[str]) -> list[str]:
    """Return factors from input to output: A, W1 … Wn, B, then any others."""
    return sorted(set(factors), key=lambda name: ({"A": 0, "W": 1, "B": 2}.get(name[:1], 3), len(name), name))


def _prepare(runs: RunSet, column: str, name: str, words: str, meaning: str) -> Content:
    frame = runs.read("factors", columns=["step", "module", "factor", column])
    window = choose_window(count_steps(frame))
    # Seeds are averaged as logarithms, as the axis shows them: an interval of a norm must not reach below zero.
    table = trajectories(frame, column, by=["factor"], window=window, scale="log").rename(columns={"factor": "panel"})
    table.insert(0, "panel", table.pop("panel"))
    table.insert(0, "quantity", column)
    finite = table["mean"][np.isfinite(table["mean"])]
    if len(finite) and not (finite != 0).any():
        raise NoValuesError(
            name,
            expected="norms above 0 at one step or more",
            got="0 throughout, as of ΔW that is the target from the start",
            do="draw the other figures, or runs that learn something",
        )
    require_curves(
        name, table[table["mean"] > 0], "check that the runs recorded factors and that their norms are finite"
    )
    unit = find_loss_unit(runs)
    return Content(
        name=name,
        table=table,
        titles={factor: _title(factor) for factor in sort_factors(list(table["panel"]))},
        label=label_axis(f"{words}\n", "factors", column, unit),
        scale="log",
        sentences=(meaning, *describe_bands(table, "log"), _GAUGE, *list_caveats(frame, table)),
        columns=define_columns("factors", ["step", "module", "factor", column], unit),
        width=WIDTHS["icml-page"],
        panel_height=1.7,
    )


def _title(factor: str) -> str:
    found = re.fullmatch(r"([A-Z])(\d*)", factor)
    return factor if found is None else f"${found[1]}_{{{found[2]}}}$" if found[2] else f"${found[1]}$"
