"""Train a grid of small chains and keep ΔW after every step in memory, where a run folder keeps its spectrum alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from linchain_analysis.errors import InputError
from linchain_analysis.measures.theory.gradients import multiply_chain
from linchain_analysis.training.synthetic.batch import Moment, train_chains
from linchain_analysis.training.synthetic.grid import MapGrid, PlannedMapRun
from linchain_analysis.training.synthetic.initial_stacks import draw_factors, stack_runs
from linchain_analysis.training.synthetic.recording import name_factors

Floats = NDArray[np.float64]
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class MapPaths:
    """What became of K chains.

    Attributes:
        labels: One row per chain: `run problem method base_learning_rate init_seed data_seed`.
        deltas: ΔW before the first step and after each, (K, steps + 1, d_in, d_out); NaN after a divergence.
        relative_loss: Population loss relative to that of ΔW = 0, (K, steps + 1).
        initial: The factors of each chain by name, A, W1, …, B, as they started.
        final: The same as they ended.
        targets: T of each chain, (K, d_in, d_out).
    """

    labels: pd.DataFrame
    deltas: Floats
    relative_loss: Floats
    initial: tuple[dict[str, Floats], ...]
    final: tuple[dict[str, Floats], ...]
    targets: Floats

    @property
    def losses(self) -> pd.DataFrame:
        """The relative loss after every step, in the form of what `analysis.convergence.read_losses` returns."""
        count, steps = self.relative_loss.shape
        rows = self.labels.loc[self.labels.index.repeat(steps - 1)].reset_index(drop=True)
        after = self.relative_loss[:, 1:].ravel()
        return rows.assign(step=np.tile(np.arange(1, steps), count), relative_loss=after)


def trace_maps(grid: MapGrid) -> MapPaths:
    """Train every run of `grid`, from the same numbers as `run_map_grid` does, and return its path.

    Raises:
        InputError: More than 1 GiB would be kept.
    """
    runs = grid.runs()
    first = runs[0].settings
    d_in, d_out = first.problem.shape
    needed = 8 * len(runs) * (first.num_steps + 1) * d_in * d_out
    if needed > _MOST_BYTES:
        raise InputError(
            "grid",
            expected="paths of at most 1 GiB",
            got=f"{needed / 2**30:.1f} GiB",
            do="trace smaller maps, fewer runs or fewer steps",
        )
    seeds = sorted({run.settings.data_seed for run in runs})
    place_of_seed = {seed: place for place, seed in enumerate(seeds)}
    problem = first.problem.draw(seeds)
    index = np.array([place_of_seed[run.settings.data_seed] for run in runs], dtype=np.intp)
    deltas = np.full((len(runs), first.num_steps + 1, d_in, d_out), np.nan)
    deltas[:, 0] = 0.0  # B = 0
    population = np.full(deltas.shape[:2], np.nan)
    final: list[dict[str, Floats]] = [{} for _ in runs]
    for places in _alike(runs):
        stack = stack_runs([runs[k].settings for k in places], place_of_seed)

        def keep(moment: Moment, places: NDArray[np.intp] = places, scale: float = stack.scale) -> None:
            deltas[places[moment.chains], moment.step] = scale * multiply_chain(moment.after)

        trained = train_chains(problem, stack, first.optimizer, first.num_steps, observe=keep, num_threads=1)
        population[places] = trained.population_loss
        names = name_factors(len(trained.factors))
        for row, k in enumerate(places):
            final[k] = {name: factor[row] for name, factor in zip(names, trained.factors, strict=True)}
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = population / problem.target_losses[index][:, None]
    drawn = [draw_factors(run.settings) for run in runs]
    initial = tuple(dict(zip(name_factors(len(factors)), factors, strict=True)) for factors in drawn)
    return MapPaths(_label(runs), deltas, relative, initial, tuple(final), problem.targets[index])


def _alike(runs: tuple[PlannedMapRun, ...]) -> list[NDArray[np.intp]]:
    """Positions of the runs whose chains have one shape."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, run in enumerate(runs):
        groups[run.settings.chain.widths].append(place)
    return [np.array(places, dtype=np.intp) for places in groups.values()]


def _label(runs: tuple[PlannedMapRun, ...]) -> pd.DataFrame:
    rows = [
        {
            # As the folder of a run among those of other problems.
            "run": f"{run.settings.label_problem()}/{run.name}",
            "problem": run.settings.label_problem(),
            "method": run.settings.method,
            "base_learning_rate": run.settings.learning_rate,
            "init_seed": run.settings.init_seed,
            "data_seed": run.settings.data_seed,
        }
        for run in runs
    ]
    return pd.DataFrame(rows)
