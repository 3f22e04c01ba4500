"""Stacks of chains as they start: one for each run, drawn from the run's own seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from linchain_analysis.measures.spectral import Array
from linchain_analysis.measures.theory.initial_factors import draw_first_factor, draw_inner_factor
from linchain_analysis.training.synthetic.batch import ChainStack
from linchain_analysis.training.synthetic.grid import MapRunSettings


def draw_factors(settings: MapRunSettings) -> list[Array]:
    """Return A, W1, …, Wn and B = 0 of one run, with their gains.

    Each factor has a stream of its own, so A is the same for all methods of one seed and rank, and W1 the same for
    chains of any length with one init and width. The streams are not those of the map with the same seed.
    """
    chain, (d_in, d_out) = settings.chain, settings.problem.shape
    streams = [
        np.random.default_rng(np.random.SeedSequence(settings.init_seed, spawn_key=(i,)))
        for i in range(chain.chain_length + 1)
    ]
    widths = chain.widths
    first = settings.first_gain * draw_first_factor(d_in, chain.rank, streams[0])
    inner = [
        settings.inner_gain * draw_inner_factor((widths[i], widths[i + 1]), chain.chain_init, streams[i + 1])
        for i in range(chain.chain_length)
    ]
    return [first, *inner, np.zeros((widths[-1], d_out))]


def stack_runs(runs: Sequence[MapRunSettings], place_of_seed: Mapping[int, int]) -> ChainStack:
    """Return the chains of runs that differ in nothing but seeds, learning rates and inits.

    Args:
        runs: Their settings.
        place_of_seed: The position of each data seed's map in the problem.
    """
    first = runs[0]
    drawn = [draw_factors(settings) for settings in runs]
    return ChainStack(
        factors=[np.stack(factors) for factors in zip(*drawn, strict=True)],
        index=np.array([place_of_seed[settings.data_seed] for settings in runs], dtype=np.intp),
        learning_rate=np.array([settings.learning_rate for settings in runs]),
        scale=first.scaling,
        trained=first.trained,
        rate_factors=first.rate_factors,
    )
