"""How large the log is: bytes for each module and recorded step, and a long run whose steps are thinned."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from linchain_analysis.benchmarks.loops import SyntheticLoop
from linchain_analysis.benchmarks.records import SyntheticRows, describe_run
from linchain_analysis.benchmarks.rows import Row, summarise
from linchain_analysis.benchmarks.settings import Settings
from linchain_analysis.benchmarks.subjects import adapt_by_method, build_llama
from linchain_analysis.runs import RunWriter
from linchain_analysis.tracking import Tracker
from linchain_analysis.tracking.schedule import parse_every

LIVE_TARGET = 450.0
PARQUET_TARGET = 330.0
RUN_TARGET = 200e6
SUFFIXES = {"live": ".arrows", "parquet": ".parquet"}


def measure_log(settings: Settings) -> Iterator[Row]:
    """Measure the size of what a tracker wrote, then of long runs under `every="auto"`."""
    yield from _measure_tracked(settings)
    num_modules, num_steps = settings.size((160, 32_000), (10, 300))
    for known in (num_steps, None):
        yield _measure_thinned(settings, num_modules, num_steps, known)


def _measure_tracked(settings: Settings) -> Iterator[Row]:
    hidden, num_layers = settings.size((512, 8), (32, 8))
    num_steps = settings.size(300, 20)
    loop = SyntheticLoop(adapt_by_method(build_llama(hidden, num_layers, settings.device)), adaptive=True, fresh=True)
    with Tracker(loop.model, loop.optimizer, settings.folder / "sizes", every=1, strict=True, quiet=True) as tracker:
        for _ in range(num_steps):
            loop.step()
        live = count_files(tracker.path, SUFFIXES["live"])
    parquet = count_files(tracker.path, SUFFIXES["parquet"])
    shutil.rmtree(tracker.path)
    num_modules = num_layers * 5
    for form, size, target in (("live", live, LIVE_TARGET), ("parquet", parquet, PARQUET_TARGET)):
        yield summarise(
            f"log/standard/{num_modules}-modules/{form}",
            size / (num_modules * num_steps),
            unit="bytes",
            target=target,
            note="for each module and recorded step, all tables together",
            num_steps=num_steps,
            total_bytes=size,
        )


def _measure_thinned(settings: Settings, num_modules: int, num_steps: int, known: int | None) -> Row:
    """Write a run as a tracker does that asks its schedule at each step; the larger of its two forms counts."""
    manifest = describe_run(num_modules)
    rows = SyntheticRows(manifest)
    schedule = parse_every("auto", num_steps=known)
    num_recorded = 0
    folder = settings.folder / "thinned"
    writer = RunWriter(folder, manifest)
    for step in range(1, num_steps + 1):
        if schedule.wants(step, writer.bytes_written):
            num_recorded += 1
            writer.append("modules", rows.draw_modules([step]))
            writer.append("factors", rows.draw_factors([step]))
        writer.append("steps", rows.draw_steps([step]))
    live = count_files(folder, "")
    writer.close()
    parquet = count_files(folder, "")
    shutil.rmtree(folder)
    length = "unknown" if known is None else "known"
    return summarise(
        f"log/auto/{num_modules}-modules-{num_steps}-steps/length-{length}",
        max(live, parquet),
        unit="bytes",
        target=RUN_TARGET,
        note=f"the whole folder, {num_recorded} steps recorded whole",
        live_bytes=live,
        parquet_bytes=parquet,
        num_recorded=num_recorded,
    )


def count_files(folder: Path, suffix: str) -> int:
    """Return the bytes of the files in `folder` whose names end in `suffix`."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.name.endswith(suffix))
