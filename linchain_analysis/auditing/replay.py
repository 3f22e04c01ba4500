"""Measures of today on the snapshots of an earlier run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from linchain_analysis.errors import InputError
from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.registry import Measure, Values, find_measure
from linchain_analysis.measures.spectral import Array, spectrum
from linchain_analysis.runs.reader import Run
from linchain_analysis.runs.snapshots import Snapshot, read_snapshots

_KEYS = {"modules": ("step", "module"), "factors": ("step", "module", "factor"), "links": ("step", "module", "link")}


def apply_measures(run: Run, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Return the columns of some measures for every snapshot, by the table they belong to.

    A measure of gradients, tokens or the base weight is NaN where the snapshots hold none.

    Args:
        run: The run.
        names: Of measures, or of columns that one of them fills in.

    Raises:
        InputError: There is no such measure, or the run has no snapshots.
    """
    measures = list({measure.name: measure for measure in map(find_measure, names)}.values())
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
    return {
        table: pd.concat(frames, ignore_index=True).sort_values(["step"], kind="stable", ignore_index=True)
        for table, frames in found.items()
    }


def describe_run(run: Run) -> dict[str, Any]:
    """Return what a run holds: steps, snapshots, recorded columns, and the last effective rank of each module."""
    snapshots = sorted({snapshot.step for snapshot in read_snapshots(run)})
    modules = run.modules
    last = modules[modules["step"] == modules["step"].max()] if len(modules) else modules
    ranks = {}
    if "effective_rank" in last:
        ranks = dict(zip(last["module"].astype(str), last["effective_rank"].astype(float), strict=True))
    return {
        "path": str(run.path),
        "method": run.method,
        "problem": run.problem,
        "status": run.status,
        "preset": run.manifest.preset,
        "steps": run.num_steps,
        "recorded_steps": int(modules["step"].nunique()) if len(modules) else 0,
        "snapshots": snapshots,
        "columns": {table: list(map(str, getattr(run, table).columns)) for table in _KEYS},
        "last_effective_ranks": ranks,
    }


def _apply(measure: Measure, cores: Cores) -> Values:
    if measure.level != "reading":
        values = measure.function(cores)
        assert not isinstance(values, np.ndarray)
        return values
    core = cores.update if measure.source == "delta_update_spectrum" else cores.delta
    sigma = spectrum(core)
    if measure.source == "spectrum" and cores.since_start is None:
        widths = [factor.shape[2] for factor in cores.before[:-1]]
        sigma = sigma[:, : min(*cores.size, *widths)]  # what lies beyond is zero up to rounding
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
