"""What the tracker keeps between steps, and how far it goes above that during one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from linchain_analysis.benchmarks.allocations import count_living, measure_peak
from linchain_analysis.benchmarks.loops import Switch, SyntheticLoop
from linchain_analysis.benchmarks.rows import Row, summarise
from linchain_analysis.benchmarks.settings import Settings
from linchain_analysis.benchmarks.subjects import adapt_by_method, build_llama
from linchain_analysis.probes import find_chains

TARGETS = {"light": None, "standard": 2.0, "full": None}
_NUM_STEPS = 3


def measure_memory(settings: Settings) -> Iterator[Row]:
    """Count tensors with and without a tracker, between steps and at the worst moment of a step."""
    hidden, num_layers = settings.size((512, 8), (32, 2))
    loop = SyntheticLoop(adapt_by_method(build_llama(hidden, num_layers, settings.device)))
    adapter_bytes = sum(count_bytes(parameter) for parameter in loop.parameters)
    group_bytes = largest_group(loop)
    bare_peak = measure_peak(loop.step, settings.folder)
    for preset, target in TARGETS.items():
        name = f"memory/{preset}/hidden-{hidden}x{num_layers}"
        switch = Switch(loop, settings.folder, preset)
        before = count_living()
        switch.turn_on()
        for _ in range(_NUM_STEPS):
            loop.step()
        after = count_living()
        kept = sum(size for address, size in after.items() if address not in before)
        peak = measure_peak(loop.step, settings.folder) - bare_peak
        switch.turn_off()
        yield summarise(
            f"{name}/kept",
            kept / adapter_bytes,
            unit="copies",
            target=target,
            note="tensor memory kept between steps / bytes of the adapter's parameters",
            bytes=kept,
        )
        yield summarise(
            f"{name}/peak",
            peak / group_bytes,
            unit="groups",
            note="tensor memory above that during a step / bytes of the largest group of layers of one shape",
            bytes=peak,
            copies=peak / adapter_bytes,
        )


def largest_group(loop: SyntheticLoop) -> int:
    """Return the bytes of all factors of the layers that share one shape, where these are most."""
    groups: Counter[Any] = Counter()
    for chain in find_chains(loop.model, loop.optimizer):
        shapes = tuple(factor.shape for factor in chain.factors)
        groups[shapes] += sum(count_bytes(factor.parameter) for factor in chain.factors)
    return max(groups.values())


def count_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
