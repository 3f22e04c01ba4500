"""Control: deeper factorisations complete a low-rank matrix better, at a lower effective rank.

The setting is that of the source in small: 40 × 40 of rank 3 with 30 % of the entries seen, where theirs is 100 × 100
of rank 5 with 20 %; both see 2.1 entries for each of the r (2d − r) degrees of freedom. Factors are square and
Gaussian, of a size at which the root mean square of the singular values of their product is 1e-3 at every depth. All
of them are trained, by gradient descent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from linchain_analysis.controls.control import Control, Finding
from linchain_analysis.controls.intervals import mean_interval, ratio_interval
from linchain_analysis.measures.cores import norm
from linchain_analysis.measures.spectral import Array, effective_rank, spectrum
from linchain_analysis.measures.theory.gradients import multiply_chain
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.style import BLACK, BLUE, GREEN, VERMILION, WIDTHS, paper_style
from linchain_analysis.problems.synthetic import MapSetting
from linchain_analysis.training.synthetic.batch import ChainStack, train_chains
from linchain_analysis.training.synthetic.optimizers import OptimizerSettings

DIM, RANK, OBSERVED = 40, 3, 0.3
# Equal singular values that make the entries' root mean square 1.
SETTING = MapSetting("spectrum", dim=DIM, target_rank=RANK, spectrum=(DIM / RANK**0.5,) * RANK, observed=OBSERVED)
DEPTHS = (2, 3, 4)
SEEDS = tuple(range(10))
INIT_SCALE = 1e-3
LEARNING_RATE = 3e-3
NUM_STEPS = 6000
TRAIN_ERROR = 0.02  # above this a run has not fitted what it sees, and its error says nothing on completion


def start_factors(depth: int, seed: int) -> list[Array]:
    """Return square Gaussian factors whose product has a Frobenius norm of about INIT_SCALE · √d."""
    generator = np.random.default_rng([seed, depth])
    scale = INIT_SCALE ** (1 / depth) / np.sqrt(DIM)
    return [scale * generator.standard_normal((DIM, DIM)) for _ in range(depth)]


def measure(depths: Sequence[int] = DEPTHS, seeds: Sequence[int] = SEEDS, num_steps: int = NUM_STEPS) -> pd.DataFrame:
    """Return a row for each depth and seed.

    Columns: depth (number of factors), seed, error (‖ΔW − T‖/‖T‖ over all entries), train_error (the same over the
    entries that are seen), effective_rank (of ΔW).
    """
    problem = SETTING.draw(seeds)
    assert problem.observed is not None
    rows = []
    for depth in depths:
        starts = [start_factors(depth, seed) for seed in seeds]
        factors = [np.stack(stack) for stack in zip(*starts, strict=True)]
        stack = ChainStack(factors, np.arange(len(seeds)), np.full(len(seeds), LEARNING_RATE))
        trained = train_chains(problem, stack, OptimizerSettings("gd"), num_steps, num_threads=1)
        delta = multiply_chain(trained.factors)
        seen = problem.observed * (delta - problem.targets)
        for k, seed in enumerate(seeds):
            alive = not trained.diverged_at[k]
            rows.append(
                {
                    "depth": depth,
                    "seed": seed,
                    "error": _relative(delta[k] - problem.targets[k], problem.targets[k], alive),
                    "train_error": _relative(seen[k], problem.observed[k] * problem.targets[k], alive),
                    "effective_rank": float(effective_rank(spectrum(delta[k]))) if alive else float("nan"),
                }
            )
    return pd.DataFrame(rows)


def _relative(difference: Array, reference: Array, alive: bool) -> float:
    return float(norm(difference) / norm(reference)) if alive else float("nan")


def judge(table: pd.DataFrame) -> Finding:
    """Compare every deeper factorisation with that of two factors, paired over seeds."""
    wide = table.pivot(index="seed", columns="depth")
    depths = sorted(table["depth"].unique())
    measured = {"largest training error": float(table["train_error"].max(skipna=False))}
    passed = measured["largest training error"] <= TRAIN_ERROR and set(DEPTHS) <= set(depths)
    parts = []
    for depth in depths[1:]:
        ratio, low, high = ratio_interval(wide["error"][depth] / wide["error"][depths[0]])
        rank, rank_low, rank_high = mean_interval(wide["effective_rank"][depth] - wide["effective_rank"][depths[0]])
        passed = passed and high < 1 and rank_high < 0
        measured |= {
            f"error ratio, depth {depth}": ratio,
            f"its upper end, depth {depth}": high,
            f"effective rank difference, depth {depth}": rank,
            f"upper end of that, depth {depth}": rank_high,
        }
        parts.append(
            f"With {depth} factors the error is {ratio:.2f} ({low:.2f} to {high:.2f}) times that with {depths[0]}, and "
            f"the effective rank differs by {rank:.2f} ({rank_low:.2f} to {rank_high:.2f})."
        )
    ranks = ", ".join(f"{value:.2f}" for value in table.groupby("depth")["effective_rank"].mean())
    parts.append(
        f"Mean effective ranks with {', '.join(map(str, depths))} factors: {ranks}, of the target {RANK}; the largest "
        f"training error is {measured['largest training error']:.1e}."
    )
    return Finding(bool(passed), " ".join(parts), measured, table, _draw(table))


def _draw(table: pd.DataFrame) -> Drawn:
    depths = sorted(table["depth"].unique())
    with paper_style():
        figure = Figure(figsize=(WIDTHS["icml-column"], 1.9), layout="constrained")
        for axes, column in zip(figure.subplots(1, 2), ("error", "effective_rank"), strict=True):
            wide = table.pivot(index="seed", columns="depth", values=column)
            axes.plot(range(len(depths)), wide.T, color="#BBBBBB", linewidth=0.6, zorder=1)
            for place, (depth, color) in enumerate(zip(depths, (BLUE, GREEN, VERMILION), strict=False)):
                axes.plot([place] * len(wide), wide[depth], "o", color=color, markersize=2.5)
            axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
            axes.set_xlim(-0.4, len(depths) - 0.6)
            axes.set_xlabel("number of factors")
            if column == "error":
                axes.set_yscale("log")
                axes.set_ylabel(r"error $\|\Delta W - T\|/\|T\|$")
            else:
                axes.axhline(RANK, color=BLACK, linewidth=0.8, dashes=(4, 2))
                axes.set_ylabel("effective rank")
    caption = (
        f"Completion of a {DIM} × {DIM} matrix of rank {RANK} from {100 * OBSERVED:.0f} % of its entries by gradient "
        f"descent on 2, 3 and 4 square factors from small Gaussian values. Left: error over all entries. Right: "
        f"effective rank of ΔW; dashed: rank of the matrix. One mark per seed ({table['seed'].nunique()}), lines join "
        "the same matrix."
    )
    return Drawn(figure, table, caption, ())


def _run() -> Finding:
    return judge(measure())


CONTROL = Control(
    name="completion",
    title="Low-rank bias of depth in matrix completion",
    claim=(
        "Gradient descent from small values completes a low-rank matrix better, at a lower effective rank, with more "
        "factors."
    ),
    source="Arora, Cohen, Hu & Luo 2019, Implicit regularization in deep matrix factorization, arXiv 1905.13655",
    criterion=(
        f"Paired over {len(SEEDS)} seeds, with 3 as with 4 factors the 95 % intervals of the ratio of errors to that "
        f"with 2 and of the difference in effective rank lie below 1 and below 0, where every run has fitted the "
        f"entries that it sees to {100 * TRAIN_ERROR:g} %."
    ),
    history="The criterion was worded after exploratory runs.",
    run=_run,
)
