"""Measures of today on the snapshots of an earlier run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from linchain_analysis.auditing.choice import load_measures, recorded_names
from linchain_analysis.errors import InputError
from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.registry import Measure, Values, all_measures, find_measure
from linchain_analysis.measures.spectral import Array, spectrum
from linchain_analysis.runs.reader import Run
from linchain_analysis.runs.snapshots import Snapshot, read_snapshots

_KEYS = {"modules": ("step", "module"), "factors": ("step", "module", "factor"), "links": ("step", "module", "link")}


def apply_measures(run: Run, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Return the columns of some measures for every snapshot, by the table they belong to.

    A measure of gradients, tokens or the base weight is NaN where the snapshots hold none.

    Args:
        run: The run.
        names: Of measures, or of columns that one of them fills in, or files (`mine.py`) that mark measures, all of
            which are applied.

    Raises:
        InputError: There is no such measure, or the run has no snapshots.
    """
    measures = list({measure.name: measure for name in names for measure in _find(name)}.values())
    factors = {record.module: [name for name, _ in record.factors] for record in run.manifest.modules}
    found: dict[str, list[pd.DataFrame]] = {}
    for snapshot in read_snapshots(run):
        by_table: dict[str, dict[str, Any]] = {}
        for measure in measures:
            values = _apply(measure, snapshot.cores)
            for column in measure.columns:
                by_table.setdefault(column.table, {})[column.name] = values[column.name]
        for table, columns in by_table.items():
            found.setdefault(table, []).append(_to_frame(table, snapshot, columns, factors))
    if not found:
        raise InputError(
            str(run.path),
            expected="a run with snapshots",
            got=f"none (it was recorded with preset {run.manifest.preset!r})",
            do='record with preset="full" or snapshot_every=N',
        )
    return {table: _sort(run, pd.concat(frames, ignore_index=True)) for table, frames in found.items()}


def describe_run(run: Run) -> dict[str, Any]:
    """Return what a run holds: steps, snapshots, columns that hold values, and of each module the last effective rank.

    Where no effective rank was recorded, or none is defined, there are the last norms of delta in its place.
    """
    snapshots = sorted({snapshot.step for snapshot in read_snapshots(run)})
    modules = run.modules
    last = _sort(run, modules[modules["step"] == modules["step"].max()]) if len(modules) else modules
    ranks = _by_module(last, "effective_rank")
    return {
        "path": str(run.path),
        "method": run.method,
        "problem": run.problem,
        "status": run.status,
        "preset": run.manifest.preset,
        "steps": run.num_steps,
        "recorded_steps": int(modules["step"].nunique()) if len(modules) else 0,
        "snapshots": snapshots,
        "columns": {table: _filled_columns(getattr(run, table)) for table in _KEYS},
        "last_effective_ranks": ranks,
        "last_delta_norms": {} if ranks else _by_module(last, "delta_norm"),
    }


def _by_module(last: pd.DataFrame, column: str) -> dict[str, float]:
    """One column of the last step; empty where it holds no value."""
    if column not in last or not last[column].notna().any():
        return {}
    return dict(zip(last["module"].astype(str), last[column].astype(float), strict=True))


def _filled_columns(table: pd.DataFrame) -> list[str]:
    return [str(name) for name in table.columns if table[name].notna().any()]


def _sort(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """Sort by step, and within a step by the model's order of modules, which is that of the manifest."""
    order = {record.module: i for i, record in enumerate(run.manifest.modules)}
    places = np.array([order.get(str(module), len(order)) for module in table["module"]])
    return table.iloc[np.lexsort((places, table["step"].to_numpy()))].reset_index(drop=True)


def _find(name: str) -> list[Measure]:
    """Return the measures of one `--measure`."""
    if name.endswith(".py"):
        return load_measures(Path(name))
    measures = all_measures()
    columns = {column.name for measure in measures.values() for column in measure.columns}
    if name not in measures and name not in columns and name in recorded_names():
        raise InputError(
            f"--measure {name}",
            expected="a measure that snapshots are needed for",
            got="what the tracker records itself",
            do="read it with load_run from the run's tables",
        )
    return [find_measure(name)]


def _apply(measure: Measure, cores: Cores) -> Values:
    if measure.level != "reading":
        values = measure.function(cores)
        assert not isinstance(values, np.ndarray)
        return values
    core = cores.update if measure.source == "delta_update_spectrum" else cores.delta
    sigma = spectrum(core)
    if measure.source == "spectrum" and cores.since_start is None:
        sigma = sigma[:, : min(cores.dims)]  # what lies beyond is zero up to rounding
    return {measure.columns[0].name: np.asarray(measure.function(sigma))}


def _to_frame(table: str, snapshot: Snapshot, columns: dict[str, Array], factors: dict[str, list[str]]) -> pd.DataFrame:
    """One row per module, or per module and factor or link; values with a further axis become lists."""
    rows: list[dict[str, Any]] = []
    for j, module in enumerate(snapshot.modules):
        parts = _parts(table, snapshot.cores, factors.get(module))
        for i, part in enumerate(parts):
            row: dict[str, Any] = {"step": snapshot.step, "module": module}
            if part is not None:
                row[_KEYS[table][2]] = part
            for name, values in columns.items():
                value = values[j] if part is None else values[j][i]
                row[name] = value if np.ndim(value) else float(value)
            rows.append(row)
    return pd.DataFrame(rows)


def _parts(table: str, cores: Cores, names: list[str] | None) -> Sequence[str | None]:
    if table == "modules":
        return [None]
    length = cores.num_factors
    names = names if names and len(names) == length else ["A", *(f"W{i}" for i in range(1, length - 1)), "B"]
    return names if table == "factors" else [f"{a}-{b}" for a, b in pairwise(names)]
