"""How the tracker's time grows with the number of modules, their width and their rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from linchain_analysis.benchmarks.loops import Switch, SyntheticLoop
from linchain_analysis.benchmarks.rows import Row, summarise
from linchain_analysis.benchmarks.settings import Settings
from linchain_analysis.benchmarks.subjects import build_stack
from linchain_analysis.benchmarks.timing import Array, take_turns

NUM_PAIRS = 16
BLOCK = 5  # steps
SLOPE_TARGET = 1.0  # at most linear
_SHORTEST = 1e-3  # ms; what is measured as less, as too few pairs may, has no logarithm worth having


def measure_growth(settings: Settings) -> Iterator[Row]:
    """Measure ms a step along three lines, each with its slope in double logarithmic coordinates."""
    usual, quick = {"modules": 40, "hidden": 128, "rank": 16}, {"modules": 4, "hidden": 16, "rank": 2}
    point = settings.size(usual, quick)
    lines: dict[str, tuple[Sequence[int], dict[str, int], float | None]] = {
        "modules": (settings.sizes((20, 40, 80, 160), (2, 4)), point, SLOPE_TARGET),
        "hidden": (settings.sizes((128, 512, 2048), (16, 32)), point, SLOPE_TARGET),
        "rank": (settings.sizes((4, 16, 64), (2, 4)), {**point, "hidden": settings.size(512, 16)}, None),
    }
    for axis, (values, around, target) in lines.items():
        points = []
        for value in values:
            sizes: dict[str, Any] = {**around, axis: value}
            points.append(measure_point(settings, **sizes))
            name = f"growth/{axis}/{value}"
            yield summarise(name, points[-1], unit="milliseconds", axis=axis, at=value, clock=settings.clock, **sizes)
        yield slope_row(f"growth/{axis}/slope", values, points, target)


def measure_point(settings: Settings, modules: int, hidden: int, rank: int) -> Array:
    """Return the CPU milliseconds (wall on an accelerator) that `standard` takes of a step, one value a pair."""
    switch = Switch(SyntheticLoop(build_stack(modules, hidden, rank, settings.device)), settings.folder, "standard")
    block = settings.size(BLOCK, 1)
    found = take_turns(switch.variants(block), settings.pairs(NUM_PAIRS), device=settings.device)
    switch.turn_off()
    milliseconds: Array = (found["tracked"].by(settings.clock) - found["untracked"].by(settings.clock)) / block * 1e3
    return milliseconds


def slope_row(name: str, sizes: Sequence[int], points: Sequence[Array], target: float | None) -> Row:
    """Return the slope of the medians, with the quartiles of the slopes of single rounds.

    Args:
        name: Name of the row.
        sizes: Size at each point.
        points: Milliseconds at each point, one value a round.
        target: The most the slope may be.
    """
    slope = fit_slope(sizes, np.array([[np.median(values)] for values in points]))[0]
    rounds = fit_slope(sizes, np.array(points))
    low, high = (float(value) for value in np.percentile(rounds, (25, 75)))
    note = "exponent of growth: 1 is linear"
    return Row(name, "ratio", float(slope), low, high, target, {"num_pairs": len(rounds)}, note)


def fit_slope(sizes: Sequence[int], milliseconds: Array) -> Array:
    """Return the least-squares slope of log(milliseconds), (points, k), over log(size), for each of k columns, (k,)."""
    x = np.log(np.asarray(sizes, dtype=np.float64))
    x -= x.mean()
    y = np.log(np.maximum(milliseconds, _SHORTEST))
    slopes: Array = x @ y / (x @ x)
    return slopes
