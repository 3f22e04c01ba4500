"""Control: in wide layers one learning rate for A and B either learns nothing or lets the features of A explode.

Hayou et al. 2024 (arXiv 2402.12354) let the width d grow, with inputs x and gradients of size 1 in each entry, A random
with features z = x A of size 1, B = 0, and Adam, whose steps have entries of ± η. In few steps then

    change of z from A's steps                   η_A d          (x and sign(∂L/∂A) are aligned: d terms of one sign)
    change of the output from B's steps          η_B z          (r terms)
    change of the output from A's steps          η_A d B        with B of size η_B

so that both stay of size 1 at every d only for η_A ∝ 1/d and η_B ∝ 1: a ratio λ = η_B/η_A ∝ d. With λ = 1 there are two
choices. η ∝ 1/d keeps the features and changes the output by 1/d only; η ∝ 1/√d changes the output by z η = √d/√d = 1,
with features that grow like √d. The exponents of d, for three rules which agree at the smallest width:

    rule                      features   output
    λ ∝ d  (η_A ∝ 1/d)           0         0
    λ = 1, η ∝ 1/d               0        −1
    λ = 1, η ∝ 1/√d              ½         0

What the theory does not say is how the loss at the best of all η with λ = 1 compares with that at the best pair. There
is a reason to expect little: Adam without its ε moves (cA, B/c) under the rates (c η_A, η_B/c) exactly as it moves
(A, B) under (η_A, η_B), so that a ratio λ is nothing but another size of A at the start. As long as η_A η_B d stays the
same, λ = 1 loses no more than what A was at the start. That comparison is measured and reported; it was left out of the
criterion once first runs had shown no gain. So is the ratio at which the best loss has doubled: as η_B cannot exceed a
size of 1, it is ∝ d.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray
from scipy import stats

from linchain_analysis.controls.control import Control, Finding
from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.orders import measure_orders
from linchain_analysis.measures.theory.initial_factors import draw_first_factor
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.style import (
    BLACK,
    BLUE,
    DASHES,
    GREEN,
    PURPLE,
    SKY,
    VERMILION,
    WIDTHS,
    paper_style,
)
from linchain_analysis.problems.synthetic import LinearMaps, MapSetting
from linchain_analysis.training.synthetic.batch import ChainStack, Moment, Trained, train_chains
from linchain_analysis.training.synthetic.optimizers import OptimizerSettings

Floats = NDArray[np.float64]

DIMS = (64, 128, 256, 512, 1024)
SEEDS = tuple(range(12))
RANK = 8
NUM_SAMPLES = 32
NUM_OUTPUTS = 16
SCALE = 2.0
NUM_STEPS = 5
# Of A and B at the smallest width, about half of the best one. Chosen after a look at others: the exponents are those
# of d → ∞, and over these widths they still depend on it. At 0.02 the output of `equal-fast` has −0.20, because the
# features' size at the start counts; at 0.1 `equal-slow` has 0.21 and −0.47, because outputs saturate at the narrow
# end. Over d = 1024 … 8192 all six are within 0.08 at each of the three rates.
RATE = 0.05
TOLERANCE = 0.15
# How the rates of A and of B go with d/DIMS[0], and the exponents predicted for features and output.
RULES = {
    "ratio": ((-1.0, 0.0), {"features": 0.0, "output": 0.0}),
    "equal-slow": ((-1.0, -1.0), {"features": 0.0, "output": -1.0}),
    "equal-fast": ((-0.5, -0.5), {"features": 0.5, "output": 0.0}),
}

TUNED_DIMS = (64, 256, 1024)
TUNED_STEPS = 15
RATIOS = tuple(4.0**k for k in range(-2, 7))
RATE_MEANS = tuple(2.0 ** (k / 2) for k in range(-8, 3))  # √(η_A η_B d), which decides most; the best lie inside
TUNING_SEEDS = tuple(range(100, 112))

_LOOKS = {
    "ratio": (r"$\lambda \propto d$", BLUE, "o"),
    "equal-slow": (r"$\lambda = 1,\ \eta \propto 1/d$", VERMILION, "s"),
    "equal-fast": (r"$\lambda = 1,\ \eta \propto 1/\sqrt{d}$", GREEN, "^"),
}


def measure(dims: Sequence[int] = DIMS, seeds: Sequence[int] = SEEDS) -> pd.DataFrame:
    """Return what some steps do at every width under every rule.

    Columns: rule, dim, seed, features (root mean square of the change of x A), output (that of x ΔW), loss (what is
    left of it), share_A and share_B (of the change of the outputs, the part that is each factor's own first order,
    mean over the steps from the second on).
    """
    rows = []
    for rule, ((power_a, power_b), _) in RULES.items():
        for dim in dims:
            width = dim / DIMS[0]
            rates = RATE * width**power_a, RATE * width**power_b
            problem = _draw_maps(dim, seeds)
            found = _watch(problem, seeds, *rates)
            rows.append(pd.DataFrame({"rule": rule, "dim": dim, "seed": seeds, **found}))
    return pd.concat(rows, ignore_index=True)


def _watch(problem: LinearMaps, seeds: Sequence[int], rate_a: float, rate_b: float) -> dict[str, Floats]:
    inputs = problem.design
    assert inputs is not None
    shares = np.zeros((NUM_STEPS, len(seeds), 2))

    def observe(moment: Moment) -> None:
        # The chain as the inputs see it, X A B: its update is the change of the outputs.
        seen = inputs[moment.chains]
        change = [after - before for after, before in zip(moment.after, moment.before, strict=True)]
        cores = Cores(
            scale=np.full(len(seen), SCALE),
            before=(seen @ moment.before[0], moment.before[1]),
            change=(seen @ change[0], change[1]),
            size=(NUM_SAMPLES, NUM_OUTPUTS),
        )
        shares[moment.step - 1, moment.chains] = measure_orders(cores)["own_share"]

    stack = _start(problem, seeds, rate_a, rate_b)
    trained = train_chains(problem, stack, OptimizerSettings("adam"), NUM_STEPS, observe=observe)
    a, b = trained.factors
    share_a, share_b = shares[1:].mean(axis=0).T
    return {
        "features": _root_mean_square(inputs @ (a - stack.factors[0])),
        "output": _root_mean_square(SCALE * (inputs @ a) @ b),
        "loss": _loss_left(trained),
        "share_A": share_a,
        "share_B": share_b,
    }


def measure_tuned(
    dims: Sequence[int] = TUNED_DIMS, ratios: Sequence[float] = RATIOS, seeds: Sequence[int] = SEEDS
) -> pd.DataFrame:
    """Return the loss left at the best learning rate of each ratio: dim, ratio, seed, rate_mean, tuning_loss, loss.

    The rate is chosen on seeds of its own, by the mean log of the loss, so that choosing flatters no ratio.
    """
    rows = []
    for dim in dims:
        tuning, fresh = _draw_maps(dim, TUNING_SEEDS), _draw_maps(dim, seeds)
        for ratio in ratios:
            losses = [np.log(_train(tuning, TUNING_SEEDS, mean, ratio)).mean() for mean in RATE_MEANS]
            best = RATE_MEANS[int(np.argmin(losses))]
            found = {"dim": dim, "ratio": ratio, "seed": seeds, "rate_mean": best, "tuning_loss": np.exp(min(losses))}
            rows.append(pd.DataFrame({**found, "loss": _train(fresh, seeds, best, ratio)}))
    return pd.concat(rows, ignore_index=True)


def _train(problem: LinearMaps, seeds: Sequence[int], rate_mean: float, ratio: float) -> Floats:
    rate = rate_mean / np.sqrt(problem.shape[0])
    stack = _start(problem, seeds, rate / np.sqrt(ratio), rate * np.sqrt(ratio))
    left = _loss_left(train_chains(problem, stack, OptimizerSettings("adam"), TUNED_STEPS))
    return np.where(np.isfinite(left), left, np.inf)  # a diverged run has the worst loss of all


def _draw_maps(dim: int, seeds: Sequence[int]) -> LinearMaps:
    """Maps whose outputs have entries of one size at every width: U √d_out Vᵀ of inputs with entries of size 1."""
    spectrum = (float(np.sqrt(NUM_OUTPUTS)),) * RANK
    setting = MapSetting("spectrum", dim, NUM_OUTPUTS, RANK, spectrum, num_samples=NUM_SAMPLES)
    return setting.draw(seeds)


def _start(problem: LinearMaps, seeds: Sequence[int], rate_a: float, rate_b: float) -> ChainStack:
    dim, num_outputs = problem.shape
    first = np.stack([draw_first_factor(dim, RANK, np.random.default_rng([seed, dim])) for seed in seeds])
    return ChainStack(
        factors=[first, np.zeros((len(seeds), RANK, num_outputs))],
        index=np.arange(len(seeds)),
        learning_rate=np.full(len(seeds), rate_a),
        scale=SCALE,
        rate_factors=(1.0, rate_b / rate_a),
    )


def _loss_left(trained: Trained) -> Floats:
    return np.asarray(trained.excess_loss[:, -1] / trained.excess_loss[:, 0])


def _root_mean_square(values: Floats) -> Floats:
    return np.asarray(np.sqrt((values**2).mean(axis=(1, 2))))


def judge(widths: pd.DataFrame, tuned: pd.DataFrame) -> Finding:
    """Judge the exponents of `measure`'s table and the paired losses in it, and report on `measure_tuned`'s."""
    measured, errors = {}, []
    for rule, (_, predicted) in RULES.items():
        part = widths[widths["rule"] == rule]
        for quantity, exponent in predicted.items():
            found = _fit_exponent(part["dim"], part[quantity])
            measured[f"{quantity} {rule}"] = found
            errors.append(abs(found - exponent))
    losses = widths.pivot_table(index=["dim", "seed"], columns="rule", values="loss", dropna=False)
    gains = (losses["ratio"] / losses["equal-slow"]).map(np.log).unstack("seed")
    low, high = _interval(gains.iloc[-1])
    trend = float(np.polyfit(np.log(gains.index), gains.mean(axis=1), 1)[0])
    measured |= {
        "loss ratio at the largest width": float(np.exp(gains.iloc[-1].mean())),
        "loss ratio, 95 % low": float(np.exp(low)),
        "loss ratio, 95 % high": float(np.exp(high)),
        "trend of the log ratio with log d": trend,
    }
    passed = all(error < TOLERANCE for error in errors) and high < 0 and trend < 0
    told = _report_tuned(tuned, measured)
    statement = (
        f"Features and outputs go with the width as predicted, the worst exponent off by {max(errors):.3f}. At equal "
        f"learning rate of A, λ = {gains.index[-1] // gains.index[0]} at d = {gains.index[-1]} leaves "
        f"{np.exp(gains.iloc[-1].mean()):.2f} (95 % {np.exp(low):.2f} to {np.exp(high):.2f}) of the loss that λ = 1 "
        f"leaves. {told}"
    )
    drawn = _draw(widths, tuned)
    return Finding(bool(passed), statement, measured, drawn.table, drawn)


def _report_tuned(tuned: pd.DataFrame, measured: dict[str, float]) -> str:
    """Compare the ratio above 1 that did best on the tuning seeds with 1, at each width, on the other seeds."""
    told = []
    for dim, part in tuned.groupby("dim"):
        losses = part.pivot_table(index="seed", columns="ratio", values="loss")
        choices = part[part["ratio"] > 1].groupby("ratio")["tuning_loss"].first()
        best = float(choices.index[int(choices.to_numpy().argmin())])
        gain = (losses[best] / losses[1.0]).map(np.log)
        low, high = np.exp(_interval(gain))
        measured[f"tuned loss ratio at d = {dim}"] = float(np.exp(gain.mean()))
        told.append(f"{np.exp(gain.mean()):.2f} ({low:.2f} to {high:.2f}) at d = {dim} with λ = {best:g}")
    edges = pd.Series({dim: _find_edge(part) for dim, part in tuned.groupby("dim")}, dtype=float)
    measured["exponent of d in the ratio at which the tuned loss doubles"] = _fit_exponent(
        edges.index.to_series(), edges
    )
    return (
        "With both at their best learning rates, which is no part of the criterion, the best λ > 1 leaves this much of "
        f"the loss that λ = 1 leaves: {'; '.join(told)}. It has doubled at λ = "
        f"{', '.join(f'{edge:.0f}' for edge in edges)}."
    )


def _find_edge(tuned: pd.DataFrame) -> float:
    """The first ratio above the best one at which the loss is twice as large; NaN beyond the largest ratio.

    Between measured ratios log loss is taken for straight in log ratio.
    """
    losses = np.log(tuned.groupby("ratio")["loss"].mean())
    ratios = np.log(losses.index.to_numpy(float))
    limit = losses.min() + np.log(2)
    above = np.flatnonzero(losses.to_numpy() >= limit)
    above = above[above > int(losses.to_numpy().argmin())]
    if not len(above):
        return float("nan")
    pair = slice(above[0] - 1, above[0] + 1)
    return float(np.exp(np.interp(limit, losses.to_numpy()[pair], ratios[pair])))


def _fit_exponent(dims: pd.Series[float], values: pd.Series[float]) -> float:
    """Slope of log values against log dims; NaN where a value is not above 0."""
    if not (values > 0).all():
        return float("nan")
    return float(np.polyfit(np.log(dims.to_numpy(float)), np.log(values.to_numpy(float)), 1)[0])


def _interval(values: pd.Series[float]) -> tuple[float, float]:
    """95 % t-interval of the mean over seeds."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def _draw(widths: pd.DataFrame, tuned: pd.DataFrame) -> Drawn:
    titles = {"features": "change of the features", "output": "output", "loss": "loss left"}
    with paper_style():
        figure = Figure(figsize=(WIDTHS["icml-page"], 2.3), layout="constrained")
        *panels, last = figure.subplots(1, 4)
        for axes, (quantity, title) in zip(panels, titles.items(), strict=True):
            for rule, (label, color, marker) in _LOOKS.items():
                part = widths[widths["rule"] == rule]
                means = part.groupby("dim")[quantity].mean()
                exponent = RULES[rule][1].get(quantity)
                if exponent is not None:
                    line = means.iloc[0] * (means.index / means.index[0]) ** exponent
                    axes.plot(means.index, line, color=color, dashes=DASHES[1])
                axes.plot(
                    part["dim"], part[quantity], marker, color=color, markersize=2.5, fillstyle="none", label=label
                )
            axes.set_title(title, pad=3)
            axes.set_xlabel("width d")
        for (dim, part), dash, color in zip(tuned.groupby("dim"), DASHES, (SKY, PURPLE, BLACK), strict=False):
            means = part.groupby("ratio")["loss"].mean()
            last.plot(means.index, means, color=color, dashes=dash, marker="o", markersize=2.5, label=f"d = {dim}")
        last.set_title("loss left, rates tuned", pad=3)
        last.set_xlabel(r"$\lambda = \eta_B/\eta_A$")
        last.legend(loc="upper left", fontsize=7, handlelength=2.2)
        for axes in (*panels, last):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter("{x:g}")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    caption = (
        f"Rank-{RANK} adapters on linear maps with {NUM_SAMPLES} inputs, Adam. First three panels: after {NUM_STEPS} "
        "steps, by the rule that takes learning rates from the smallest width to larger ones; marks are seeds, dashed "
        f"lines the predicted exponents. Last: after {TUNED_STEPS} steps at the best rate for each ratio λ, chosen on "
        "other seeds; means over seeds."
    )
    table = pd.concat([widths.assign(panel="widths"), tuned.assign(panel="tuned")], ignore_index=True)
    return Drawn(figure, table, caption, ())


def _run() -> Finding:
    return judge(measure(), measure_tuned())


CONTROL = Control(
    name="lora-plus",
    title="Learning rates of A and B in wide layers",
    claim=(
        "In wide layers features and outputs both change by a stable amount only if B has a learning rate that is "
        "larger than A's in proportion to the width; with one rate for both, learning vanishes or features explode."
    ),
    source="Hayou, Ghosh & Yu 2024, LoRA+: Efficient low rank adaptation of large models, arXiv 2402.12354",
    criterion=(
        f"Over d = {DIMS[0]} … {DIMS[-1]} the exponents of d in the change of features and in the output are within "
        f"{TOLERANCE} of 0 and 0 for λ ∝ d, of 0 and −1 for λ = 1 with η ∝ 1/d, and of ½ and 0 for λ = 1 with "
        "η ∝ 1/√d; at equal rate of A the loss left with λ ∝ d is below that with λ = 1 at the largest width (95 % "
        f"t-interval over {len(SEEDS)} paired seeds), and the more so the wider."
    ),
    run=_run,
)
