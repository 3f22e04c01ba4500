"""Columns that follow from the spectra that are stored.

Those that every run has are computed once more when a run is completed and stored beside the spectra, in float32 as
everything there; where they are not stored they are computed on reading and rounded alike, so that a run reads the
same while it is written and afterwards. Those of measures are computed when somebody asks for them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from linchain_analysis.measures.registry import find_measure
from linchain_analysis.measures.spectral import Array, effective_rank, frobenius_norm, spectral_norm, stable_rank
from linchain_analysis.runs.ragged import measure_ragged

_FORMULAS: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "delta_norm": ("spectrum", frobenius_norm),
    "delta_spectral_norm": ("spectrum", spectral_norm),
    "effective_rank": ("spectrum", effective_rank),
    "stable_rank": ("spectrum", stable_rank),
    "delta_update_norm": ("delta_update_spectrum", frobenius_norm),
    "delta_update_effective_rank": ("delta_update_spectrum", effective_rank),
}
# Norms are stored by themselves where no spectrum was taken.
_STORED_NORMS = ("delta_norm", "delta_update_norm")


def sources_of(name: str) -> tuple[str, ...]:
    """Return the stored columns that derived column `name` is computed from."""
    source, _ = _formula(name)
    return (source, name) if name in _STORED_NORMS else (source,)


def derive(rows: pa.Table, names: Sequence[str]) -> dict[str, Array]:
    """Compute derived columns of `modules` in float64; NaN where neither spectrum nor norm is stored."""
    by_source: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_source[_formula(name)[0]].append(name)
    result = {}
    for source, own in by_source.items():
        flat, lengths, present = flatten(rows[source])
        for name, measured in measure_ragged(flat, lengths, {name: _formula(name)[1] for name in own}).items():
            if name in _STORED_NORMS and name in rows.column_names:
                result[name] = rows[name].to_numpy().astype(np.float64)
            else:
                result[name] = np.full(len(present), np.nan)
            result[name][present] = _round(measured) if name in _FORMULAS else measured
    return {name: result[name] for name in names}


def add_derived(rows: pa.Table) -> tuple[pa.Table, list[str]]:
    """Return rows of `modules` with the derived columns that every run has, and their names."""
    names = list(_FORMULAS)
    for name, values in derive(rows, names).items():
        # Null where nothing was taken, NaN where what was taken says nothing.
        known = rows[_formula(name)[0]].is_valid().to_numpy()
        if name in _STORED_NORMS:
            known = known | rows[name].is_valid().to_numpy()
        array = pa.array(values.astype(np.float32), mask=~known)
        position = rows.schema.get_field_index(name)
        rows = rows.set_column(position, name, array) if position >= 0 else rows.append_column(name, array)
    return rows, names


def flatten(column: pa.ChunkedArray) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
    """Return the values of all lists one after the other, the length of each that is there, and which are there."""
    present = column.is_valid().to_numpy()
    chunks = [chunk for chunk in column.chunks if len(chunk) > chunk.null_count]
    if not chunks:
        return np.zeros(0, np.float32), np.zeros(0, np.int64), present
    flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks])
    lengths = np.concatenate([chunk.value_lengths().drop_null().to_numpy() for chunk in chunks])
    return flat, lengths.astype(np.int64), present


def _formula(name: str) -> tuple[str, Callable[[Array], Array]]:
    if name in _FORMULAS:
        return _FORMULAS[name]
    found = find_measure(name)
    return found.source, lambda sigma: np.asarray(found.function(sigma))


def _round(values: Array) -> Array:
    """To what float32 holds of them."""
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float32).astype(np.float64)
