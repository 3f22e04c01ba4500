"""Measures of many spectra of any lengths, in blocks that stay in the cache of a processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.measures.spectral import Array

_BLOCK = 2048  # rows; of 16 values in float64 a quarter of a megabyte


def measure_ragged(
    flat: NDArray[Any], lengths: NDArray[np.integer], formulas: Mapping[str, Callable[[Array], Array]]
) -> dict[str, Array]:
    """Evaluate formulas of the last axis on every row.

    Args:
        flat: Values of all rows, one row after the other, any real dtype; formulas get float64.
        lengths: Of each of the k rows. Shorter rows are padded with zeros on the right, as far as the longest one
            nearby, so what a formula returns must not depend on zeros there.
        formulas: From (rows, length) to (rows,).

    Returns:
        Per formula its (k,) values.
    """
    found = {name: np.empty(len(lengths)) for name in formulas}
    for rows, block in blocks_of(flat, lengths):
        for name, formula in formulas.items():
            found[name][rows] = formula(block)
    return found


def blocks_of(flat: NDArray[Any], lengths: NDArray[np.integer]) -> Iterator[tuple[slice, Array]]:
    """Yield which rows a block holds, and the rows in float64, padded with zeros on the right.

    In memory the columns of a block come one after the other: sums along its rows then add whole columns, several
    times as fast.
    """
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    for start in range(0, len(lengths), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(lengths)))
        yield rows, _pad(flat[ends[rows.start] : ends[rows.stop]], lengths[rows])


def _pad(flat: NDArray[Any], lengths: NDArray[np.integer]) -> Array:
    longest = int(lengths.max())
    if (lengths == longest).all():
        return flat.reshape(len(lengths), longest).astype(np.float64, order="F")
    block = np.zeros((len(lengths), longest), order="F")
    block[np.arange(longest) < lengths[:, None]] = flat
    return block
