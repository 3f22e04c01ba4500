"""Control: gradient descent lets the factors' balance drift in proportion to its rate, and gradient flow keeps it.

One step changes F_iᵀF_i − F_{i+1}F_{i+1}ᵀ by η² (G_iᵀG_i − G_{i+1}G_{i+1}ᵀ), G_i = ∂L/∂F_i, because the terms of order
η cancel: F_iᵀG_i = G_{i+1}F_{i+1}ᵀ, both being scale · (F_0 … F_i)ᵀ G (F_{i+1} … F_{n+1})ᵀ. A time t = η · steps holds
t/η steps, so that the drift at a fixed time is ∝ η, and 0 for η → 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from linchain_analysis.controls.control import Control, Finding
from linchain_analysis.measures.balance import measure_balance, squares
from linchain_analysis.measures.spectral import Array
from linchain_analysis.measures.theory.initial_factors import draw_first_factor, draw_inner_factors
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.style import BLUE, DASHES, GREEN, ORANGE, SOLID, VERMILION, WIDTHS, paper_style
from linchain_analysis.problems.synthetic import LinearMaps, MapSetting
from linchain_analysis.training.synthetic.batch import ChainStack, train_chains
from linchain_analysis.training.synthetic.flow import flow_chain
from linchain_analysis.training.synthetic.optimizers import OptimizerSettings
from linchain_analysis.training.synthetic.small_cores import reduce_chains
from linchain_analysis.vocabulary import columns_of

NUM_INNER = 2
RANK = 4
SETTING = MapSetting("shear-rotation", dim=12, target_rank=4)
TIME = 8.0  # long enough for the loss to fall by more than half
# Half decades of the rate, from 0.02 down. The law is that of small rates: descent becomes unstable at 2/sharpness,
# about 0.2 here, and at a tenth of that what comes after the first order in the rate is some 10 %.
NUM_STEPS = (400, 1265, 4000, 12649, 40000)
SEEDS = (0, 1, 2, 3, 4)
SLOPE_ERROR = 0.1
FLOW_DRIFT = 1e-7  # the tolerance 1e-10 of each step of the integration, times at most some hundred steps


def start_factors(seed: int, setting: MapSetting = SETTING) -> list[Array]:
    """Return A, W1, W2 of Kaiming's init and B = 0, as an adapter starts."""
    generator = np.random.default_rng([seed, 17])
    first = draw_first_factor(setting.shape[0], RANK, generator)
    inner = draw_inner_factors([RANK] * (NUM_INNER + 1), "kaiming", generator)
    return [first, *inner, np.zeros((RANK, setting.shape[1]))]


def measure_drift(start: Sequence[Array], end: Sequence[Array]) -> Array:
    """Return the column `balance_drift` (chains, links) of stacks of factors at the start and at the end."""
    cores = reduce_chains(
        end,
        [np.zeros_like(factor) for factor in end],
        None,
        1.0,
        trained=[True] * len(end),
        start_squares=tuple(squares(tuple(start), i) for i in range(len(start) - 1)),
    )
    return np.asarray(measure_balance(cores)["balance_drift"])


def measure(num_steps: Sequence[int] = NUM_STEPS, seeds: Sequence[int] = SEEDS) -> pd.DataFrame:
    """Return the drift at `TIME` of every seed and link for each rate and for the flow, whose rate is 0.

    Columns: learning_rate, seed, link, balance_drift, loss_left (the loss at that time relative to that at the start).
    """
    problem = SETTING.draw(seeds)
    starts = [np.stack(factors) for factors in zip(*(start_factors(seed) for seed in seeds), strict=True)]
    rows = []
    for count in num_steps:
        stack = ChainStack(starts, np.arange(len(seeds)), np.full(len(seeds), TIME / count))
        trained = train_chains(problem, stack, OptimizerSettings("gd"), count, num_threads=1)
        left = trained.population_loss[:, -1] / trained.population_loss[:, 0]
        rows += _rows(TIME / count, seeds, measure_drift(starts, trained.factors), left)
    flows = [_flow(problem, [factor[k] for factor in starts], k) for k in range(len(seeds))]
    ends = [np.stack(factors) for factors in zip(*(factors for factors, _ in flows), strict=True)]
    rows += _rows(0.0, seeds, measure_drift(starts, ends), np.array([left for _, left in flows]))
    return pd.DataFrame(rows)


def _flow(problem: LinearMaps, start: Sequence[Array], k: int) -> tuple[list[Array], float]:
    flow = flow_chain(problem, start, [0.0, TIME], map=k)
    return [factor[-1] for factor in flow.factors], float(flow.loss[-1] / flow.loss[0])


def _rows(rate: float, seeds: Sequence[int], drift: Array, left: Array) -> list[dict[str, float]]:
    return [
        {"learning_rate": rate, "seed": seed, "link": link, "balance_drift": drift[k, link], "loss_left": left[k]}
        for k, seed in enumerate(seeds)
        for link in range(drift.shape[1])
    ]


def judge(table: pd.DataFrame) -> Finding:
    """Fit the slope of log drift against log rate for each link and seed, and look at the drift of the flow."""
    descent, flow = table[table["learning_rate"] > 0], table[table["learning_rate"] == 0]
    slopes = [_slope(part) for _, part in descent.groupby(["link", "seed"])]
    lowest, highest = (float(np.min(slopes)), float(np.max(slopes))) if slopes else (np.nan, np.nan)
    largest = float(flow["balance_drift"].max(skipna=False)) if len(flow) else float("nan")
    rates = descent["learning_rate"]
    decades = float(np.log10(rates.max() / rates.min())) if len(rates) else float("nan")
    passed = bool(
        1 - SLOPE_ERROR <= lowest <= highest <= 1 + SLOPE_ERROR and decades >= 2 - 1e-9 and largest <= FLOW_DRIFT
    )
    statement = (
        f"Over {decades:.1f} decades of the learning rate the slope of log drift against log rate is {lowest:.3f} to "
        f"{highest:.3f} over links and seeds; the largest drift of the gradient flow is {largest:.1e}."
    )
    measured = {
        "smallest slope": lowest,
        "largest slope": highest,
        "decades of the learning rate": decades,
        "largest drift of the flow": largest,
    }
    return Finding(passed, statement, measured, table, _draw(table))


def _slope(part: pd.DataFrame) -> float:
    drift = part["balance_drift"].to_numpy(dtype=float)
    if not (np.isfinite(drift).all() and (drift > 0).all() and len(drift) > 1):
        return float("nan")
    return float(np.polyfit(np.log(part["learning_rate"]), np.log(drift), 1)[0])


def _draw(table: pd.DataFrame) -> Drawn:
    links = sorted(table["link"].unique())
    names = ["A, W1", *(f"W{i}, W{i + 1}" for i in range(1, len(links) - 1)), f"W{len(links) - 1}, B"]
    descent, flow = table[table["learning_rate"] > 0], table[table["learning_rate"] == 0]
    with paper_style():
        figure = Figure(figsize=(WIDTHS["icml-column"], 2.3), layout="constrained")
        axes = figure.subplots()
        rates = np.sort(descent["learning_rate"].unique())
        for link, color, dash in zip(links, (BLUE, ORANGE, GREEN, VERMILION), (SOLID, *DASHES[1:]), strict=False):
            part = descent[descent["link"] == link].groupby("learning_rate")["balance_drift"]
            line: dict[str, Any] = {"color": color, "linestyle": (0, dash) if dash else "-"}
            axes.plot(rates, part.median(), marker="o", markersize=2.5, label=names[link], **line)
            axes.fill_between(rates, part.min(), part.max(), color=color, alpha=0.16, linewidth=0)
            # The flow is drawn where the axis has no zero: as a level.
            axes.axhline(max(flow.loc[flow["link"] == link, "balance_drift"].max(), 1e-17), linewidth=0.8, **line)
        middle = float(descent.loc[descent["learning_rate"] == rates[len(rates) // 2], "balance_drift"].median())
        axes.plot(rates, 0.2 * middle * rates / rates[len(rates) // 2], color="#777777", linewidth=0.8)
        axes.annotate(
            "slope 1",
            (rates[-2], 0.2 * middle * rates[-2] / rates[len(rates) // 2]),
            (3, -9),
            textcoords="offset points",
            fontsize=7,
            color="#777777",
        )
        axes.annotate(
            "gradient flow", (rates[0], flow["balance_drift"].max()), (0, 4), textcoords="offset points", fontsize=7
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("learning rate $\\eta$")
        axes.set_ylabel("balance drift")
        axes.legend(fontsize=7, title="neighbours", title_fontsize=7, handlelength=2.4)
    seeds = table["seed"].nunique()
    caption = (
        f"Relative drift of F_iᵀF_i − F_{{i+1}}F_{{i+1}}ᵀ after the time η · steps = {TIME:g} of gradient descent on "
        f"a {SETTING.name} map ({SETTING.dim} × {SETTING.dim}), chains of {NUM_INNER} inner factors, r = {RANK}. "
        f"Lines: median over {seeds} seeds; bands: smallest to largest. Levels: the largest drift of the gradient "
        "flow. The column depends on the gauge."
    )
    columns = tuple(column for column in columns_of("links") if column.name == "balance_drift")
    return Drawn(figure, table, caption, columns)


def _run() -> Finding:
    return judge(measure())


CONTROL = Control(
    name="balance",
    title="Balance of neighbouring factors",
    claim=(
        "Gradient flow conserves F_iᵀF_i − F_{i+1}F_{i+1}ᵀ of neighbouring factors; gradient descent lets it drift in "
        "proportion to the learning rate."
    ),
    source=(
        "Arora, Cohen & Hazan 2018, On the optimization of deep networks, arXiv 1802.06509; Du, Hu & Lee 2018, "
        "Algorithmic regularization in learning deep homogeneous models, arXiv 1806.00900"
    ),
    criterion=(
        f"At a fixed time and for every link and seed ({len(SEEDS)}) the slope of log drift against log rate is "
        f"1 ± {SLOPE_ERROR:g} over at least 2 decades of the rate, and the drift of the gradient flow is at most "
        f"{FLOW_DRIFT:g}, what the tolerance of its integration allows."
    ),
    history=(
        "The range of rates first went up to 0.2, and the control failed, with slopes up to 1.22: gradient descent "
        "becomes unstable at 0.15 to 0.25 here. It then was made to end at 0.02. The criterion was worded after "
        "exploratory runs."
    ),
    run=_run,
)
