"""Write a run that is over already, whole: what was computed at once needs no streams in between."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from linchain_analysis.errors import RunError
from linchain_analysis.runs.columns import to_arrow
from linchain_analysis.runs.derived import add_derived
from linchain_analysis.runs.manifest import MANIFEST, Manifest, now, numbers_of, write_manifest
from linchain_analysis.runs.parquet import name_columns, write_parquet
from linchain_analysis.runs.schema import TABLES, live_schema, parquet_name

# There while a run is written this way, and the manifest afterwards.
UNFINISHED = f"{MANIFEST}.part"


def complete_table(
    folder: Path,
    table: str,
    rows: pa.Table,
    numbers: Mapping[str, Mapping[str, int]],
    *,
    number: int = 1,
    durable: bool = True,
) -> dict[str, Any]:
    """Write a table of a complete run, with the columns that follow from others; return what the manifest keeps of it.

    Args:
        folder: The run folder.
        table: Which table.
        rows: As its stream holds them, modules and factors by number.
        numbers: The number of each name.
        number: Of the part of the run.
        durable: As in `write_parquet`.
    """
    rows = name_columns(rows, numbers)
    derived: list[str] = []
    if table == "modules":
        rows, derived = add_derived(rows)
    entry = write_parquet(folder / parquet_name(table, number), rows, durable=durable)
    return {**entry, "derived": derived} if derived else entry


def write_run(folder: str | Path, manifest: Manifest, tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a complete run.

    The manifest comes last, so a process that dies on the way leaves a folder that does not read as a run. Nothing
    waits for the disk: of a run that was written just before a power failure tables may be damaged, which reading says.

    Args:
        folder: The run folder, made with its parents; empty where it is there already.
        manifest: What the run says of itself; its status, its end and its tables are filled in here.
        tables: Columns by table, as `RunWriter.append` takes them; what is left out is empty.

    Raises:
        RunError: The folder holds something, somebody else is writing there, or a table, column or name is not known.
        OSError: The folder cannot be made or written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unknown = sorted(set(tables) - set(TABLES))
    if unknown:
        raise RunError(
            "write_run", expected=f"tables among {', '.join(TABLES)}", got=", ".join(unknown), do="check the names"
        )
    found = sorted(path.name for path in folder.iterdir())
    if found:
        raise RunError(
            str(folder), expected="an empty folder", got=", ".join(found[:3]), do="choose another folder or empty it"
        )
    with contextlib.ExitStack() as undo:
        try:
            (folder / UNFINISHED).touch(exist_ok=False)
        except FileExistsError as error:
            raise RunError(
                str(folder), expected="a folder that nobody else writes", got=UNFINISHED, do="choose another folder"
            ) from error
        undo.callback((folder / UNFINISHED).unlink, missing_ok=True)
        numbers = numbers_of(manifest)
        entries = {}
        for table in TABLES:
            undo.callback((folder / parquet_name(table)).unlink, missing_ok=True)
            schema = live_schema(table, manifest.columns)
            columns = tables.get(table)
            rows = (
                pa.Table.from_pydict(to_arrow(table, schema, columns, numbers), schema=schema)
                if columns
                else schema.empty_table()
            )
            entries[table] = complete_table(folder, table, rows, numbers, durable=False)
        complete = replace(manifest, status="complete", ended=manifest.ended or now(), tables=entries)
        write_manifest(folder, complete, part_name=UNFINISHED, durable=False)
        undo.pop_all()
