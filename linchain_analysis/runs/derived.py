"""Columns that are computed on reading, from the spectra that are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from linchain_analysis.measures.registry import find_measure
from linchain_analysis.measures.spectral import Array, effective_rank, frobenius_norm, spectral_norm, stable_rank

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


def _formula(name: str) -> tuple[str, Callable[[Array], Array]]:
    if name in _FORMULAS:
        return _FORMULAS[name]
    found = find_measure(name)
    return found.source, lambda sigma: np.asarray(found.function(sigma))


def derive(rows: pa.Table, names: Sequence[str]) -> dict[str, Array]:
    """Compute derived columns of `modules`; NaN where neither spectrum nor norm is stored."""
    padded: dict[str, tuple[Array, np.ndarray]] = {}
    result = {}
    for name in names:
        source, formula = _formula(name)
        if source not in padded:
            padded[source] = _pad(rows[source])
        sigma, present = padded[source]
        values = np.full(len(present), np.nan)
        values[present] = formula(sigma[present])
        if name in rows.column_names:
            stored = rows[name].to_numpy(zero_copy_only=False)
            values = np.where(present, values, np.asarray(stored, dtype=np.float64))
        result[name] = values
    return result


def _pad(column: pa.ChunkedArray) -> tuple[Array, np.ndarray]:
    """Ragged spectra as one array (rows, longest), zeros on the right, and which rows have one."""
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], type=column.type)
    present = np.asarray(lists.is_valid())
    lengths = np.nan_to_num(np.asarray(lists.value_lengths().to_numpy(zero_copy_only=False), dtype=np.float64)).astype(
        int
    )
    longest = int(lengths.max(initial=0))
    sigma = np.zeros((len(lists), longest))
    filled = np.arange(longest) < lengths[:, None]
    sigma[filled] = lists.flatten().to_numpy(zero_copy_only=False)
    return sigma, present
