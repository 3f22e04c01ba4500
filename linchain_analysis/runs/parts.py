"""The parts of a run: one, or several where its training was resumed, each with files of its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from linchain_analysis.errors import DamageError
from linchain_analysis.runs.manifest import Manifest, numbers_of
from linchain_analysis.runs.parquet import name_columns, read_parquet
from linchain_analysis.runs.schema import TABLES, live_schema, stream_name
from linchain_analysis.runs.streams import read_stream, read_until_damage


@dataclass(frozen=True)
class Part:
    """Where one part of a run stands.

    Attributes:
        number: In the names of its files.
        tables: What the manifest keeps of its files; empty while it is written or when it was killed.
        columns: Per table, name and kind of each column that its measures added.
        last_step: Rows of later steps do not count, None for the last part, all of whose rows do.
    """

    number: int
    tables: Mapping[str, Mapping[str, Any]]
    columns: Mapping[str, Sequence[Sequence[str]]]
    last_step: int | None = None

    def derived(self, table: str) -> set[str]:
        """Return the columns that were computed when this part was completed."""
        return set(self.tables.get(table, {}).get("derived", ()))

    def is_live(self, table: str) -> bool:
        """Whether the table is a stream that may still grow."""
        return self.last_step is None and table not in self.tables

    def file(self, table: str) -> str:
        """Return the name of the file of a table."""
        return str(self.tables[table]["file"]) if table in self.tables else stream_name(table, self.number)


def parts_of(manifest: Manifest) -> tuple[Part, ...]:
    """Return the parts of a run, oldest first."""
    earlier = (Part(s.number, s.tables, s.columns, s.last_step) for s in manifest.segments)
    return (*earlier, Part(manifest.number, manifest.tables, manifest.columns))


def schema_of(manifest: Manifest, table: str) -> pa.Schema:
    """Return the columns of a table in all parts, as they are stored."""
    added = [list(column) for part in parts_of(manifest) for column in part.columns.get(table, ())]
    return live_schema(table, {table: added})


def read_part(
    folder: Path, part: Part, table: str, columns: Sequence[str] | None = None, *, drop_damage: bool = False
) -> tuple[pa.Table, bool]:
    """Read what one part holds of a table, with numbers in place of names where it is a stream.

    Args:
        folder: The run folder.
        part: The part.
        table: The table.
        columns: Which columns, as far as this part has them; all of them by default.
        drop_damage: Read what is certainly right, with a warning, instead of raising.

    Returns:
        The rows, and whether all of them are there.

    Raises:
        DamageError: What is stored is not what was written.
        FileNotFoundError: There is no stream, so it is complete by now, or lost.
    """
    schema = live_schema(table, part.columns)
    entry = part.tables.get(table)
    if entry is None and part.tables:  # a table that came with a later schema version than this part
        return schema.empty_table(), True
    names = [*schema.names, *(name for name in part.derived(table) if name not in schema.names)]
    wanted = None if columns is None else [name for name in names if name in columns]
    whole = True
    if entry is not None and part.file(table).endswith(".parquet"):
        try:
            return _until(read_parquet(folder, entry, wanted), part.last_step), True
        except DamageError as error:
            if not drop_damage:
                raise
            warnings.warn(f"{error} Nothing of this file is read.", stacklevel=6)
        rows, whole = schema.empty_table(), False
    else:
        rows, whole = _read_stream(folder, part, table, schema, drop_damage=drop_damage)
    if wanted is not None:
        rows = rows.select([name for name in wanted if name in schema.names])
    return _until(rows, part.last_step), whole


def named(rows: pa.Table, manifest: Manifest) -> pa.Table:
    """Return rows with names of modules and factors, if they have numbers."""
    numbers = numbers_of(manifest)
    if any(name in rows.column_names and pa.types.is_integer(rows[name].type) for name in numbers):
        return name_columns(rows, numbers)
    return rows


def _read_stream(
    folder: Path, part: Part, table: str, schema: pa.Schema, *, drop_damage: bool
) -> tuple[pa.Table, bool]:
    path = folder / part.file(table)
    entry = part.tables.get(table)
    try:
        rows, whole = read_until_damage(path, schema) if drop_damage else (read_stream(path, schema), True)
    except FileNotFoundError as error:
        if entry is None and _never_began(folder, part):
            return schema.empty_table(), True
        if entry is None:
            raise
        fault = DamageError(str(path), expected="the stream of an earlier part", got="no such file", do=_RESTORE)
        if not drop_damage:
            raise fault from error
        warnings.warn(f"{fault} Nothing of this file is read.", stacklevel=7)
        return schema.empty_table(), False
    # What a later part goes on from is over: it cannot be a stream that was cut while it grew.
    if whole and entry is not None and rows.num_rows != entry["num_rows"]:
        got = f"{rows.num_rows} rows instead of {entry['num_rows']}"
        fault = DamageError(str(path), expected="the stream of an earlier part", got=got, do=_RESTORE)
        if not drop_damage:
            raise fault
        warnings.warn(f"{fault} What stands before is read.", stacklevel=7)
        return rows.slice(0, entry["num_rows"]), False
    return rows, whole


_RESTORE = "restore the file from a copy"


def _never_began(folder: Path, part: Part) -> bool:
    """Whether the writer died before it had made all streams, so that none of them holds anything."""
    paths = [folder / stream_name(table, part.number) for table in TABLES]
    return not any(path.exists() and path.stat().st_size for path in paths)


def _until(rows: pa.Table, last_step: int | None) -> pa.Table:
    if last_step is None or not len(rows) or pa.compute.max(rows["step"]).as_py() <= last_step:
        return rows
    return rows.filter(pa.compute.less_equal(rows["step"], last_step))
