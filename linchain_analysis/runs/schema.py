"""How the tables of a run are stored while it is written and when it is complete."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

SCHEMA_VERSION = 3

_SPECTRUM = pa.list_(pa.float32())
# Modules and factors are numbers in a live stream, and names in Parquet, which then says by itself what it is about.
_NUMBER = pa.int32()

LIVE: dict[str, pa.Schema] = {
    "steps": pa.schema(
        [
            ("step", pa.int64()),
            ("epoch", pa.float64()),
            ("loss", pa.float64()),
            ("learning_rate", pa.float64()),
            ("grad_norm", pa.float64()),
            ("clip_coef", pa.float64()),
            ("skipped", pa.bool_()),
            ("tokens", pa.int64()),
            ("seconds", pa.float64()),
            ("track_seconds", pa.float64()),
        ]
    ),
    "modules": pa.schema(
        [
            ("step", pa.int32()),
            ("module", _NUMBER),
            ("spectrum", _SPECTRUM),
            ("delta_update_spectrum", _SPECTRUM),
            ("descent_cosine", pa.float32()),
            # For presets that take no spectra; null where a spectrum says more.
            ("delta_norm", pa.float32()),
            ("delta_update_norm", pa.float32()),
        ]
    ),
    "factors": pa.schema(
        [
            ("step", pa.int32()),
            ("module", _NUMBER),
            ("factor", _NUMBER),
            ("grad_norm", pa.float32()),
            ("grad_cosine_previous", pa.float32()),
            ("update_norm", pa.float32()),
            ("weight_norm", pa.float32()),
            ("update_ratio", pa.float32()),
        ]
    ),
    "links": pa.schema(
        [("step", pa.int32()), ("module", _NUMBER), ("link", pa.string()), ("balance_drift", pa.float32())]
    ),
    "evals": pa.schema(
        [("step", pa.int64()), ("split", pa.string()), ("metric", pa.string()), ("value", pa.float64())]
    ),
    "scalars": pa.schema([("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())]),
    # One row per step and module of a snapshot: its small cores, as the bytes of a safetensors file.
    "snapshots": pa.schema([("step", pa.int32()), ("module", _NUMBER), ("tensors", pa.binary())]),
    # One row per finding that begins or ends: what it is, of which module or quantity, and in words.
    "health": pa.schema(
        [
            ("step", pa.int64()),
            ("finding", pa.string()),
            ("subject", pa.string()),
            ("began", pa.bool_()),
            ("message", pa.string()),
        ]
    ),
}
TABLES = tuple(LIVE)
# A row of these counts only if the table `steps`, written last in each step, has its step.
BY_STEP = ("modules", "factors", "links", "snapshots")
_SINCE = {"snapshots": 2, "health": 3}  # the schema version that brought a table, where it was not the first

# How the kinds of `vocabulary.Column` are stored in the columns that measures add.
_STORED = {
    "int": pa.int32(),
    "float": pa.float32(),
    "bool": pa.bool_(),
    "text": pa.string(),
    "spectrum": _SPECTRUM,
    "values": _SPECTRUM,
}


def tables_of(schema_version: int) -> tuple[str, ...]:
    """Return the tables that a run of that schema version has."""
    return tuple(table for table in TABLES if _SINCE.get(table, 1) <= schema_version)


def live_schema(table: str, added: Mapping[str, Sequence[Sequence[str]]]) -> pa.Schema:
    """Return how `table` is stored while a run is written, with the columns that its measures add.

    Args:
        table: Which table.
        added: Per table name and kind of each added column, as the manifest keeps them.
    """
    schema = LIVE[table]
    for name, kind in added.get(table, ()):
        if name not in schema.names:
            schema = schema.append(pa.field(name, _STORED[kind]))
    return schema


def stream_name(table: str, number: int = 1) -> str:
    """Return the file name of a table while part `number` of the run is written."""
    return f"{_stem(table, number)}.arrows"


def parquet_name(table: str, number: int = 1) -> str:
    """Return the file name of a table of a complete part of a run."""
    return f"{_stem(table, number)}.parquet"


def next_number(folder: Path) -> int:
    """Return a number that no file of a table in `folder` has, also none left by an attempt that died."""
    named = re.compile(rf"(?:{'|'.join(TABLES)})-(\d+)\.(?:arrows|parquet)(?:\.part)?")
    found = [named.fullmatch(path.name) for path in folder.iterdir()]
    return max([1, *(int(match[1]) for match in found if match)]) + 1


def _stem(table: str, number: int) -> str:
    return table if number == 1 else f"{table}-{number}"
