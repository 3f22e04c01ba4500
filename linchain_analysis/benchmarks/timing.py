"""Variants measured in turns, in one process, by two clocks."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _do_nothing() -> None:
    return None


@dataclass(frozen=True)
class Variant:
    """One of several ways to do the same.

    Attributes:
        name: Name, unique among those measured together.
        run: One unit: a whole training step, or a block of steps.
        prepare: Done before each unit, outside its time.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = field(default=_do_nothing)


@dataclass(frozen=True)
class Timings:
    """Seconds of each unit of one variant, in order, (pairs,).

    Attributes:
        cpu: CPU time of this process, all threads together.
        wall: Elapsed time.
    """

    cpu: Array
    wall: Array

    def by(self, clock: str) -> Array:
        """Return the seconds of one clock, `cpu` or `wall`."""
        return self.cpu if clock == "cpu" else self.wall


def take_turns(
    variants: Sequence[Variant], num_rounds: int, *, device: str = "cpu", num_warmups: int = 1
) -> dict[str, Timings]:
    """Measure each variant once a round, in the order A B … B A …, so that a drift of the machine favours none.

    What lives already is kept from the garbage collector meanwhile: a collection that one variant happens to trigger
    would otherwise walk through everything that was ever imported.

    Args:
        variants: What to measure.
        num_rounds: Units of each; the i-th ones stand next to each other in time and form a pair.
        device: On an accelerator every unit ends when its work there has ended.
        num_warmups: Unmeasured units of each before the first round.
    """
    seconds: dict[str, list[tuple[float, float]]] = {variant.name: [] for variant in variants}
    for variant in variants:
        for _ in range(num_warmups):
            variant.prepare()
            variant.run()
    gc.collect()
    gc.freeze()
    try:
        for number in range(num_rounds):
            for variant in variants if number % 2 == 0 else reversed(variants):
                variant.prepare()
                seconds[variant.name].append(_measure(variant.run, device))
    finally:
        gc.unfreeze()
    pairs = {name: np.array(values, dtype=np.float64).reshape(-1, 2) for name, values in seconds.items()}
    return {name: Timings(values[:, 0], values[:, 1]) for name, values in pairs.items()}


def _measure(run: Callable[[], object], device: str) -> tuple[float, float]:
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronize(device)
    return time.process_time() - cpu, time.perf_counter() - wall


def synchronize(device: str) -> None:
    """Wait for what an accelerator still has to do."""
    if device != "cpu":
        torch.cuda.synchronize()
