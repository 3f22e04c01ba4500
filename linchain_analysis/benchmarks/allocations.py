"""Memory of tensors: what lives in this process, and how far a step goes above what lived before it."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

_WARMUPS = 3
_MEASURED = "measured step"


def count_living() -> dict[int, int]:
    """Return the bytes of every storage that a tensor of this process refers to, by its address.

    Whoever holds it: a tracker's memory is what is there with it and was not there without.
    """
    gc.collect()
    living: dict[int, int] = {}
    for candidate in gc.get_objects():
        # By type and not by isinstance: that would ask lazy modules and proxies, which then import things.
        if issubclass(type(candidate), Tensor) and candidate.layout is torch.strided and not candidate.is_meta:
            storage = candidate.untyped_storage()
            if storage.nbytes():
                living[storage.data_ptr()] = storage.nbytes()
    return living


def measure_peak(step: Callable[[], object], folder: Path) -> int:
    """Return how many bytes more than at its start are allocated at the worst moment of a step.

    Torch's allocator is listened to, so that memory inside operations counts. Several steps are listened to and the
    last one counts: what it frees was then seen to be allocated.

    Args:
        step: Takes one step.
        folder: Scratch folder.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        for _ in range(_WARMUPS):
            step()
        with record_function(_MEASURED):
            step()
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    path.unlink()
    return find_peak(events)


def find_peak(events: list[dict[str, Any]]) -> int:
    """Return the highest level of allocated bytes during the measured step, above that at its start.

    Args:
        events: A profiler's trace, in any order: `[memory]` events with `ts`, `Bytes` and `Ev Idx`, and one event
            named as the measured step with `ts` and `dur`.
    """
    span = next(event for event in events if event.get("name") == _MEASURED and event.get("dur"))
    begin, end = span["ts"], span["ts"] + span["dur"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    level = peak = 0
    for event in sorted(memory, key=lambda event: (event["ts"], event["args"].get("Ev Idx", 0))):
        if begin <= event["ts"] <= end:
            level += event["args"]["Bytes"]
            peak = max(peak, level)
    return peak
