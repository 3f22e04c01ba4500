"""Put together what the parts of a run hold of one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from linchain_analysis.measures.spectral import Array

# Of an evaluation that was made again after a training went on, the last one stands.
_LAST_STANDS = {"evals": ("step", "split", "metric")}


@dataclass(frozen=True)
class Piece:
    """Rows of one table.

    Attributes:
        rows: What is stored.
        computed: Columns that were computed on reading.
        kept: Which stored columns were computed, and rounded, when the run was completed.
    """

    rows: pa.Table
    computed: Mapping[str, Array] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)


def join_pieces(pieces: Sequence[Piece], table: str) -> Piece:
    """Return the rows of all parts, oldest first; null where a part does not have a column."""
    if len(pieces) == 1:
        return pieces[0]
    rows = pa.concat_tables([_widen(piece) for piece in pieces], promote_options="default")
    keys = _LAST_STANDS.get(table)
    if keys is not None:
        superseded = rows.select(keys).to_pandas().duplicated(keep="last").to_numpy()
        rows = rows.filter(pa.array(~superseded))
    return Piece(rows)


def _widen(piece: Piece) -> pa.Table:
    """Put what was computed, now or when the part was completed, into the rows in one type."""
    rows = piece.rows
    for name in piece.kept:
        position = rows.schema.get_field_index(name)
        rows = rows.set_column(position, name, rows[name].cast(pa.float64()))
    for name, values in piece.computed.items():
        position = rows.schema.get_field_index(name)
        array = pa.array(values, type=pa.float64())
        rows = rows.set_column(position, name, array) if position >= 0 else rows.append_column(name, array)
    return rows
