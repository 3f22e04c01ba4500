"""How long it takes to read and to draw a long complete run."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from linchain_analysis.benchmarks.records import SyntheticRows, describe_run
from linchain_analysis.benchmarks.rows import Row, summarise
from linchain_analysis.benchmarks.settings import Settings
from linchain_analysis.plots import plot_effective_rank
from linchain_analysis.runs import RunWriter, load_run, load_runs
from linchain_analysis.vocabulary import columns_of

NUM_READINGS = 3
SCALARS_TARGET = 1.0
EVERYTHING_TARGET = 6.0
DRAWING_TARGET = 8.0
TABLES = ("steps", "modules", "factors")
_BLOCK = 50  # steps of one append


def measure_reading(settings: Settings) -> Iterator[Row]:
    """Read every scalar column, then everything, then draw; each time from a run that is opened anew."""
    num_steps, num_modules = settings.size((10_000, 160), (60, 10))
    folder = write_run(settings.folder / "long", num_modules, num_steps)
    jobs: dict[str, tuple[Callable[[], object], float | None, str]] = {
        "scalars": (
            partial(read_scalars, folder, TABLES),
            SCALARS_TARGET,
            "every column of steps, modules and factors except spectra, derived ones included",
        ),
        **{
            f"scalars-of-{table}": (partial(read_scalars, folder, (table,)), None, "part of scalars")
            for table in TABLES
        },
        "effective-rank": (partial(_read_rank, folder), None, "the one column, with its key"),
        "everything": (partial(_read_everything, folder), EVERYTHING_TARGET, "steps, modules and factors whole"),
        "drawing": (partial(_draw, folder), DRAWING_TARGET, "the effective-rank figure, read, computed and rendered"),
    }
    size = f"{num_modules}-modules-{num_steps}-steps"
    try:
        for name, (job, target, note) in jobs.items():
            wall, cpu = zip(*(_time(job) for _ in range(settings.size(NUM_READINGS, 1))), strict=True)
            yield summarise(
                f"reading/{name}/{size}", wall, unit="seconds", target=target, note=note, cpu_seconds=sorted(cpu)[0]
            )
    finally:
        shutil.rmtree(folder)


def write_run(folder: Path, num_modules: int, num_steps: int) -> Path:
    """Write a complete run of which every step is recorded, and return its folder."""
    manifest = describe_run(num_modules)
    rows = SyntheticRows(manifest)
    writer = RunWriter(folder, manifest)
    for start in range(1, num_steps + 1, _BLOCK):
        steps = range(start, min(start + _BLOCK, num_steps + 1))
        writer.append("modules", rows.draw_modules(steps))
        writer.append("factors", rows.draw_factors(steps))
        writer.append("steps", rows.draw_steps(steps))
    writer.close()
    return folder


def scalar_columns(table: str) -> list[str]:
    """Return the columns of a table that hold one value a row."""
    return [column.name for column in columns_of(table) if column.kind not in ("spectrum", "values")]


def read_scalars(folder: Path, tables: tuple[str, ...]) -> list[Any]:
    """Read every scalar column of some tables."""
    run = load_run(folder)
    return [run.steps if table == "steps" else run.read(table, scalar_columns(table)) for table in tables]


def _read_rank(folder: Path) -> Any:
    return load_run(folder).read("modules", ["step", "module", "effective_rank"])


def _read_everything(folder: Path) -> Any:
    run = load_run(folder)
    return run.steps, run.modules, run.factors


def _draw(folder: Path) -> bytes:
    return plot_effective_rank(load_runs([folder])).render("png")


def _time(job: Callable[[], object]) -> tuple[float, float]:
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = job()
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    del result  # letting go of it is not reading
    return seconds
