"""From the columns a caller has to Arrow arrays of the stored types."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from linchain_analysis.errors import RunError

_FLOATS = {pa.float32(): np.float32, pa.float64(): np.float64}


def to_arrow(
    table: str, schema: pa.Schema, columns: Mapping[str, Any], numbers: Mapping[str, Mapping[str, int]]
) -> dict[str, pa.Array]:
    """Return every stored column of `table`, null where the caller has none.

    Args:
        table: Which table.
        schema: What it stores.
        columns: Sequences or arrays of one length; a column stored as numbers may be given as an integer array of them.
        numbers: For columns stored as numbers, the number of each name.

    Raises:
        RunError: A column or name that is not known, or columns of different length.
    """
    unknown = set(columns) - set(schema.names)
    lengths = {name: len(values) for name, values in columns.items()}
    if unknown or len(set(lengths.values())) != 1:
        got = f"unknown {sorted(unknown)}" if unknown else f"lengths {lengths}"
        raise RunError(f"append to {table}", expected="known columns of one length", got=got, do="check the caller")
    length = next(iter(lengths.values()))
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes Inf
        return {
            field.name: _array(table, field, columns[field.name], numbers.get(field.name))
            if field.name in columns
            else _nulls(length, field.type)
            for field in schema
        }


@lru_cache(maxsize=64)
def _nulls(length: int, kind: pa.DataType) -> pa.Array:
    # `pa.nulls` shares one oversized buffer, which IPC cuts to size: the checksum would not be that of what is read.
    return pa.array([None] * length, type=kind)


def _array(table: str, field: pa.Field, values: Any, numbers: Mapping[str, int] | None) -> pa.Array:
    if numbers is not None and not (isinstance(values, np.ndarray) and values.dtype.kind == "i"):
        try:
            values = np.fromiter((numbers[value] for value in values), dtype=np.int32, count=len(values))
        except KeyError as error:
            raise RunError(
                f"append to {table}", expected=f"a {field.name} of the manifest", got=str(error), do="declare it there"
            ) from None
    if pa.types.is_list(field.type):
        return _lists(field.type, values)
    if pa.types.is_floating(field.type):
        values = np.asarray(values, dtype=_FLOATS[field.type])
    return pa.array(values, type=field.type)


def _lists(kind: pa.DataType, values: Any) -> pa.Array:
    """Ragged rows, null where a row is None."""
    if isinstance(values, np.ndarray):  # (rows, length): none is None
        flat = values.astype(np.float32).ravel()
        offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat), type=kind)
    lengths = np.array([0 if row is None else len(row) for row in values])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows = [np.asarray(row, dtype=np.float64) for row in values if row is not None]
    flat = np.concatenate(rows).astype(np.float32) if rows else np.zeros(0, np.float32)
    missing = np.array([row is None for row in values], dtype=bool)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(flat), type=kind, mask=pa.array(missing) if missing.any() else None
    )
