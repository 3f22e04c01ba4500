"""What tracking every step costs: a tracked training step over an untracked one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from linchain_analysis.benchmarks.loops import Switch, SyntheticLoop, TrainingLoop
from linchain_analysis.benchmarks.rows import Row, compare, summarise
from linchain_analysis.benchmarks.settings import Settings
from linchain_analysis.benchmarks.subjects import adapt_by_method, build_builtin, build_llama, draw_tokens
from linchain_analysis.benchmarks.timing import Array, Variant, take_turns

NUM_PAIRS = {"standard": 24, "full": 12, "light": 12}
_BLOCK = 3  # steps
TARGETS = {"standard": 1.01, "full": 1.05, "light": None}
BUILTIN_TARGET = 1.05
MILLISECONDS_TARGET = 10.0


def measure_tracker(settings: Settings) -> Iterator[Row]:
    """Compare steps with and without the tracker, on a Llama by preset and on the built-in model."""
    hidden, num_layers = settings.size((512, 8), (32, 2))
    model = adapt_by_method(build_llama(hidden, num_layers, settings.device))
    loop = TrainingLoop(model, draw_tokens(*settings.size((8, 128), (2, 16)), device=settings.device))
    size = f"hidden-{hidden}x{num_layers}"
    yield _measure_noise(settings, loop, size)
    for preset, target in TARGETS.items():
        goal = MILLISECONDS_TARGET if preset == "standard" else None
        yield from _measure(settings, loop, preset, size, target, goal, settings.size(_BLOCK, 1))
        yield _isolate(settings, SyntheticLoop(model, adaptive=True), preset, size)
    small = TrainingLoop(*build_builtin(settings.device))
    yield from _measure(settings, small, "standard", "builtin", BUILTIN_TARGET, None, settings.size(5, 1))


def _measure(
    settings: Settings,
    loop: TrainingLoop,
    preset: str,
    size: str,
    target: float | None,
    milliseconds: float | None,
    block: int = 1,
) -> Iterator[Row]:
    """Measure the whole step with and without, and then the tracker's part of it directly.

    A share of one in a hundred is less than most machines' noise. Clipping and the optimiser's step, in which the
    tracker does its work, are a small part of the step, so their difference with and without it says more.
    """
    name = f"tracker/{preset}/{size}"
    switch = Switch(loop, settings.folder, preset)
    untracked, tracked = (UpdateClock(variant, loop) for variant in switch.variants(block))
    found = take_turns((untracked.variant, tracked.variant), settings.pairs(NUM_PAIRS[preset]), device=settings.device)
    switch.turn_off()
    yield compare(name, found["tracked"], found["untracked"], clock=settings.clock, target=target)
    own = (tracked.seconds - untracked.seconds) / block
    yield summarise(
        f"{name}/cpu-time",
        own * 1e3,
        unit="milliseconds",
        target=milliseconds,
        note="CPU time a step of clipping and the optimiser's step, tracked minus untracked",
        clock="cpu",
    )
    yield summarise(
        f"{name}/cpu-share",
        1 + own / (found["untracked"].cpu / block),
        note="1 + that time / CPU time of the untracked step",
        clock="cpu",
    )
    yield summarise(
        f"{name}/track-seconds",
        switch.track_seconds * 1e3,
        unit="milliseconds",
        note="wall time a step that the tracker counts as its own, in the column track_seconds of its run",
        clock="wall",
    )


def _measure_noise(settings: Settings, loop: TrainingLoop, size: str) -> Row:
    """Compare untracked steps with untracked steps: how far from 1 a ratio can be on this machine for no reason."""
    same = (Variant("one", loop.step), Variant("other", loop.step))
    found = take_turns(same, settings.pairs(NUM_PAIRS["standard"]), device=settings.device)
    note = "untracked over untracked: the noise of the rows below"
    return compare(f"tracker/none/{size}", found["other"], found["one"], clock=settings.clock, note=note)


def _isolate(settings: Settings, loop: SyntheticLoop, preset: str, size: str) -> Row:
    """Measure the tracker's CPU time, all of its hooks included, where there is little else: gradients are given."""
    block = settings.size(10, 2)
    switch = Switch(loop, settings.folder, preset)
    found = take_turns(switch.variants(block), settings.pairs(20), device=settings.device)
    switch.turn_off()
    return summarise(
        f"tracker/{preset}/{size}/cpu-time-without-model",
        (found["tracked"].cpu - found["untracked"].cpu) / block * 1e3,
        unit="milliseconds",
        note="CPU time a step, tracked minus untracked, in a step whose gradients are given",
        clock="cpu",
    )


class UpdateClock:
    """Counts, for each unit of a variant, the CPU seconds that its loop spent on clipping and the optimiser's step.

    Args:
        variant: What is measured.
        loop: Its loop.
    """

    def __init__(self, variant: Variant, loop: TrainingLoop) -> None:
        self._run = variant.run
        self._loop = loop
        self._seconds: list[float] = []
        self.variant = replace(variant, run=self._count)

    @property
    def seconds(self) -> Array:
        """CPU seconds of each unit, without the unmeasured one at the start."""
        return np.array(self._seconds[1:], dtype=np.float64)

    def _count(self) -> None:
        before = self._loop.update_seconds
        self._run()
        self._seconds.append(self._loop.update_seconds - before)
