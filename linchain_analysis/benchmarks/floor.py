"""The tracker's time over that of merely reading what it reads: three passes of norms."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from linchain_analysis.benchmarks.loops import Switch, SyntheticLoop
from linchain_analysis.benchmarks.rows import Row, summarise
from linchain_analysis.benchmarks.settings import Settings
from linchain_analysis.benchmarks.subjects import adapt_by_method, build_llama
from linchain_analysis.benchmarks.timing import Variant, take_turns

NUM_PAIRS = 30
BLOCK = 10  # steps
TARGETS = {"light": 3.0, "standard": None}


def measure_floor(settings: Settings) -> Iterator[Row]:
    """Compare the tracker with the norms of all factors, all gradients and one old copy of the factors."""
    hidden, num_layers = settings.size((512, 8), (32, 2))
    block = settings.size(BLOCK, 2)
    loop = SyntheticLoop(adapt_by_method(build_llama(hidden, num_layers, settings.device)))
    factors = [parameter.detach() for parameter in loop.parameters]
    read = [*factors, *loop.gradients, *(factor.clone() for factor in factors)]

    def read_all() -> None:
        for _ in range(block):
            torch._foreach_norm(read)

    for preset, target in TARGETS.items():
        switch = Switch(loop, settings.folder, preset)
        variants = (*switch.variants(block), Variant("floor", read_all))
        found = take_turns(variants, settings.pairs(NUM_PAIRS), device=settings.device)
        switch.turn_off()
        seconds = {name: timings.by(settings.clock) for name, timings in found.items()}
        own = seconds["tracked"] - seconds["untracked"]
        name = f"floor/{preset}/hidden-{hidden}x{num_layers}"
        note = "(tracked − untracked step) / torch._foreach_norm of factors, gradients and one old copy"
        yield summarise(name, own / seconds["floor"], target=target, note=note, clock=settings.clock)
        yield summarise(f"{name}/tracker", own / block * 1e3, unit="milliseconds", clock=settings.clock)
        yield summarise(f"{name}/norms", seconds["floor"] / block * 1e3, unit="milliseconds", clock=settings.clock)
