"""What the control lora-plus trains: rank-8 adapters on linear maps, at growing widths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.orders import measure_orders
from linchain_analysis.measures.theory.initial_factors import draw_first_factor
from linchain_analysis.problems.synthetic import LinearMaps, MapSetting
from linchain_analysis.training.synthetic.batch import ChainStack, Moment, Trained, train_chains
from linchain_analysis.training.synthetic.optimizers import OptimizerSettings

Floats = NDArray[np.float64]

DIMS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
RATES = (0.02, 0.05, 0.1)  # of A and B at the smallest width, where the best one is near 0.1
SEEDS = tuple(range(12, 18))
RANK = 8
NUM_SAMPLES = 32
NUM_OUTPUTS = 16
SCALE = 2.0
NUM_STEPS = 5
# How the rates of A and of B go with d/DIMS[0].
RULES = {"ratio": (-1.0, 0.0), "equal-slow": (-1.0, -1.0), "equal-fast": (-0.5, -0.5)}

TUNED_DIMS = (64, 256, 1024)
TUNED_STEPS = 15
RATIOS = tuple(4.0**k for k in range(-2, 7))
RATE_MEANS = tuple(2.0 ** (k / 2) for k in range(-8, 3))  # √(η_A η_B d), which decides most; the best lie inside
TUNED_SEEDS = tuple(range(12))
TUNING_SEEDS = tuple(range(100, 112))


def measure(dims: Sequence[int] = DIMS, seeds: Sequence[int] = SEEDS, rates: Sequence[float] = RATES) -> pd.DataFrame:
    """Return what some steps do at every width under every rule, from each rate at the smallest width.

    Columns: rate, rule, dim, seed, features (root mean square of the change of x A), output (that of x ΔW), loss (what
    is left of it), share_A and share_B (of the change of the outputs, the part that is each factor's own first order,
    mean over the steps from the second on).
    """
    rows = []
    for dim in dims:
        problem, width = draw_maps(dim, seeds), dim / DIMS[0]
        for rate in rates:
            for rule, (power_a, power_b) in RULES.items():
                found = _watch(problem, seeds, rate * width**power_a, rate * width**power_b)
                rows.append(pd.DataFrame({"rate": rate, "rule": rule, "dim": dim, "seed": seeds, **found}))
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

    stack = start_chains(problem, seeds, rate_a, rate_b)
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
    dims: Sequence[int] = TUNED_DIMS, ratios: Sequence[float] = RATIOS, seeds: Sequence[int] = TUNED_SEEDS
) -> pd.DataFrame:
    """Return the loss left at the best learning rate of each ratio: dim, ratio, seed, rate_mean, tuning_loss, loss.

    The rate is chosen on seeds of its own, by the mean log of the loss, so that choosing flatters no ratio.
    """
    rows = []
    for dim in dims:
        tuning, fresh = draw_maps(dim, TUNING_SEEDS), draw_maps(dim, seeds)
        for ratio in ratios:
            losses = [np.log(train_at(tuning, TUNING_SEEDS, mean, ratio)).mean() for mean in RATE_MEANS]
            best = RATE_MEANS[int(np.argmin(losses))]
            found = {"dim": dim, "ratio": ratio, "seed": seeds, "rate_mean": best, "tuning_loss": np.exp(min(losses))}
            rows.append(pd.DataFrame({**found, "loss": train_at(fresh, seeds, best, ratio)}))
    return pd.concat(rows, ignore_index=True)


def train_at(problem: LinearMaps, seeds: Sequence[int], rate_mean: float, ratio: float) -> Floats:
    """Return the part of the loss that is left in each seed at η_A η_B d = `rate_mean`² and η_B/η_A = `ratio`."""
    rate = rate_mean / np.sqrt(problem.shape[0])
    stack = start_chains(problem, seeds, rate / np.sqrt(ratio), rate * np.sqrt(ratio))
    left = _loss_left(train_chains(problem, stack, OptimizerSettings("adam"), TUNED_STEPS))
    return np.where(np.isfinite(left), left, np.inf)  # a diverged run has the worst loss of all


def draw_maps(dim: int, seeds: Sequence[int]) -> LinearMaps:
    """Maps whose outputs have entries of one size at every width: U √d_out Vᵀ of inputs with entries of size 1."""
    spectrum = (float(np.sqrt(NUM_OUTPUTS)),) * RANK
    setting = MapSetting("spectrum", dim, NUM_OUTPUTS, RANK, spectrum, num_samples=NUM_SAMPLES)
    return setting.draw(seeds)


def start_chains(problem: LinearMaps, seeds: Sequence[int], rate_a: float, rate_b: float) -> ChainStack:
    """Return an adapter of each seed as it starts, A random and B = 0, with the rates of its factors."""
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
