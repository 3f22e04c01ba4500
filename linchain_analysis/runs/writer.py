"""Write a run folder: live streams while training goes on, Parquet at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from linchain_analysis.errors import RunError
from linchain_analysis.runs.columns import to_arrow
from linchain_analysis.runs.derived import add_derived
from linchain_analysis.runs.manifest import MANIFEST, Manifest, now, read_manifest, write_manifest
from linchain_analysis.runs.parquet import name_columns, read_parquet, write_parquet
from linchain_analysis.runs.schema import LIVE, TABLES, live_schema, parquet_name, stream_name
from linchain_analysis.runs.streams import StreamWriter, read_stream


class RunWriter:
    """Writes one run.

    Args:
        path: The run folder, made with its parents. Other files in it, such as checkpoints, are left alone.
        manifest: What the run says of itself.

    Raises:
        RunError: The folder holds a run already.
        OSError: The folder cannot be made or written.
    """

    def __init__(self, path: str | Path, manifest: Manifest) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        taken = [name for name in _run_files() if (self.path / name).exists()]
        if taken:
            raise RunError(
                str(self.path), expected="a folder without a run", got=", ".join(taken), do="choose another folder"
            )
        self.manifest = manifest
        self.bytes_written = 0  # of the manifest and all tables but snapshots
        self.snapshot_bytes_written = 0
        self._schemas = {table: live_schema(table, manifest.columns) for table in LIVE}
        self.numbers = numbers_of(manifest)
        self._closed = False
        self._manifest_bytes = 0
        self._write_manifest()
        self._streams = {
            table: StreamWriter(self.path / stream_name(table), schema) for table, schema in self._schemas.items()
        }

    @classmethod
    def resume(cls, path: str | Path, manifest: Manifest, *, after: int) -> RunWriter:
        """Go on with the run in `path` after its step `after`; what it holds of later steps is superseded.

        Raises:
            RunError: There is no run, it is of another training or schema, or another process is writing it.
        """
        raise RunError(str(path), expected="a later version", got="this one", do="wait")

    def update_manifest(self, **changes: Any) -> None:
        """Change fields of the manifest and write it anew, whole."""
        self.manifest = replace(self.manifest, **changes)
        self.numbers = numbers_of(self.manifest)
        self._write_manifest()

    def append(self, table: str, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> int:
        """Append rows to `table` and return how many bytes that took.

        Columns that are not given are null. The rows are with the operating system when this returns.

        Raises:
            RunError: A table, column or name that is not known, columns of different length, or a closed run.
            OSError: The rows could not be written.
        """
        if self._closed:
            raise RunError(str(self.path), expected="an open run", got="a closed one", do="append before closing")
        if table not in self._schemas:
            raise RunError("append", expected=f"a table among {', '.join(LIVE)}", got=repr(table), do="check the name")
        arrays = to_arrow(table, self._schemas[table], columns, self.numbers)
        written = self._streams[table].append(arrays)
        if table == "snapshots":
            self.snapshot_bytes_written += written
        else:
            self.bytes_written += written
        return written

    def close(self, status: str = "complete", message: str | None = None) -> None:
        """End the run: tables become Parquet, then the manifest says so, then the streams go.

        A process that dies in between leaves either the streams or all of the Parquet files to be read.
        """
        if self._closed:
            return
        self._closed = True
        for stream in self._streams.values():
            stream.close()
        tables = {}
        for table in TABLES:
            rows = name_columns(read_stream(self.path / stream_name(table), self._schemas[table]), self.numbers)
            derived: list[str] = []
            if table == "modules":
                rows, derived = add_derived(rows)
            tables[table] = write_parquet(self.path / parquet_name(table), rows)
            if derived:
                tables[table]["derived"] = derived
        self.update_manifest(status=status, message=message, ended=now(), tables=tables)
        for table in TABLES:
            (self.path / stream_name(table)).unlink(missing_ok=True)

    def _write_manifest(self) -> None:
        write_manifest(self.path, self.manifest)
        size = (self.path / MANIFEST).stat().st_size
        self.bytes_written += size - self._manifest_bytes
        self._manifest_bytes = size


def append_evals(path: str | Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Add evaluations to a run that has ended.

    Args:
        path: The run folder.
        columns: `step`, `split`, `metric` and `value`, of one length.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if "evals" not in manifest.tables:
        raise RunError(str(folder), expected="a run that has ended", got=manifest.status, do="use its writer")
    old = read_parquet(folder, manifest.tables["evals"])
    new = pa.Table.from_pydict(to_arrow("evals", LIVE["evals"], columns, {}), schema=LIVE["evals"])
    # Under a name of its own, so that a process that dies here leaves manifest and file in agreement.
    former = str(manifest.tables["evals"]["file"])
    number = int(former.removesuffix(".parquet").rpartition("-")[2] or 1) + 1 if "-" in former else 2
    entry = write_parquet(folder / f"evals-{number}.parquet", pa.concat_tables([old, new]))
    write_manifest(folder, replace(manifest, tables={**manifest.tables, "evals": entry}))
    (folder / former).unlink(missing_ok=True)


def numbers_of(manifest: Manifest) -> dict[str, dict[str, int]]:
    """The number of each module and of each name of a factor."""
    factors = dict.fromkeys(name for record in manifest.modules for name, _ in record.factors)
    return {
        "module": {record.module: number for number, record in enumerate(manifest.modules)},
        "factor": {name: number for number, name in enumerate(factors)},
    }


def _run_files() -> list[str]:
    return [MANIFEST, *(stream_name(table) for table in TABLES), *(parquet_name(table) for table in TABLES)]
