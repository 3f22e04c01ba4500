"""Write a run folder: live streams while training goes on, Parquet at the end."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from linchain_analysis.errors import LinchainError, RunError
from linchain_analysis.runs.columns import to_arrow
from linchain_analysis.runs.complete import complete_table
from linchain_analysis.runs.continuation import continue_manifest
from linchain_analysis.runs.lock import RunLock
from linchain_analysis.runs.manifest import MANIFEST, Manifest, now, numbers_of, read_manifest, write_manifest
from linchain_analysis.runs.parquet import read_parquet, write_parquet
from linchain_analysis.runs.process import describe_process
from linchain_analysis.runs.schema import LIVE, TABLES, live_schema, parquet_name, stream_name
from linchain_analysis.runs.streams import StreamWriter, read_stream

# Evaluations after the end are short work: whoever else adds some is waited for.
_EVALS_PATIENCE_SECONDS = 5.0
# Of a manifest that signals interrupt as it is written: they come once or twice, and a storm must not hold training up.
_MOST_REWRITES = 8


class RunWriter:
    """Writes one run, alone: a second writer of the same folder is refused until this one is closed or dies.

    Args:
        path: The run folder, made with its parents. Other files in it, such as checkpoints, are left alone.
        manifest: What the run says of itself.

    Raises:
        RunError: The folder holds a run already, or somebody else is writing one there.
        OSError: The folder cannot be made or written.
    """

    def __init__(self, path: str | Path, manifest: Manifest) -> None:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder)
        try:
            taken = [name for name in _run_files() if (folder / name).exists()]
            if taken:
                raise RunError(
                    str(folder), expected="a folder without a run", got=", ".join(taken), do="choose another folder"
                )
            self._begin(folder, manifest, lock)
            self._write_manifest()
            self._open_streams()
        except BaseException:
            lock.release()
            raise

    @classmethod
    def resume(cls, path: str | Path, manifest: Manifest, *, after: int) -> RunWriter:
        """Go on with the run in `path` after its step `after`; what it holds of later steps is superseded.

        Nothing that is there is rewritten but the manifest: what follows goes to files of its own.

        Args:
            path: The run folder.
            manifest: What the part that follows says of itself.
            after: The last step that stands, 0 for none.

        Raises:
            RunError: There is no run, it is of another training or an older schema, it has no such step, or somebody
                else is writing it.
            DamageError: What it holds is damaged.
        """
        folder = Path(path)
        read_manifest(folder)  # before a lock is left where no run is
        lock = RunLock(folder)
        writer = cls.__new__(cls)
        try:
            writer._begin(folder, continue_manifest(folder, read_manifest(folder), manifest, after), lock)
            writer._open_streams()
            writer._write_manifest()  # from here on the new part counts
        except BaseException:
            lock.release()
            raise
        return writer

    def _begin(self, path: Path, manifest: Manifest, lock: RunLock) -> None:
        self.path = path
        self._folder = path.absolute()  # whatever folder the training works in later
        self._lock = lock
        self._pid = os.getpid()
        self._manifest = replace(manifest, process=describe_process())
        self._marked: dict[str, Any] = {}
        self._manifest_guard = threading.RLock()
        self._mark_numbers = itertools.count(1)
        self.bytes_written = 0  # of the manifest and all tables of this part but snapshots
        self.snapshot_bytes_written = 0
        self._schemas = {table: live_schema(table, manifest.columns) for table in TABLES}
        self._streams: dict[str, StreamWriter] = {}
        self.numbers = numbers_of(manifest)
        self._closed = False
        self._ended = False
        self._manifest_bytes = 0

    @property
    def manifest(self) -> Manifest:
        """What the run says of itself."""
        return replace(self._manifest, **self._marked) if self._marked else self._manifest

    def update_manifest(self, **changes: Any) -> None:
        """Change fields of the manifest and write it anew, whole.

        Raises:
            RunError: The folder vanished.
            OSError: It could not be written; then nothing has changed.
        """
        with self._manifest_guard:
            former, marked = self._manifest, self._marked
            self._manifest = replace(former, **changes)
            self._marked = {name: value for name, value in marked.items() if name not in changes}
            try:
                self._write_manifest()
            except Exception:
                self._manifest, self._marked = former, marked
                raise
            self.numbers = numbers_of(self._manifest)

    def mark(self, status: str, message: str | None = None) -> None:
        """Say in the manifest how the run ended, and nothing more: for a process that has little time left.

        It may be called by a signal handler, whatever this thread or another one is doing here. The tables stay
        streams, which can be read and still be written, and `close` can follow.

        Args:
            status: `failed` or `interrupted`.
            message: Why.

        Raises:
            RunError: The folder vanished.
            OSError: The manifest could not be written, so it says what it said before.
        """
        if os.getpid() != self._pid:
            return
        with self._manifest_guard:  # one thread can take it twice: it may be interrupted in `update_manifest`
            if self._ended:
                return
            self._marked = {"status": status, "message": message, "ended": now()}
            self._write_manifest(part_name=f"{MANIFEST}.mark-{next(self._mark_numbers)}.part")

    def append(self, table: str, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> int:
        """Append rows to `table` and return how many bytes that took.

        Columns that are not given are null. The rows are with the operating system when this returns.

        Raises:
            RunError: A table, column or name that is not known, columns of different length, a closed run, or a folder
                that vanished.
            OSError: The rows could not be written.
        """
        if self._closed:
            raise RunError(str(self.path), expected="an open run", got="a closed one", do="append before closing")
        if os.getpid() != self._pid:
            raise RunError(
                str(self.path),
                expected=f"rows from process {self._pid}, which opened the run",
                got=f"process {os.getpid()}, forked from it",
                do="append in the process that made the writer",
            )
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

        A process that dies in between leaves either the streams or all of the Parquet files to be read. In a forked
        child this does nothing.

        Raises:
            RunError: The tables could not become Parquet, so the streams stay; the manifest says `failed` if it can be
                written. Or the folder vanished.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        try:
            for stream in self._streams.values():
                with contextlib.suppress(OSError):  # a stream is as good without its end mark
                    stream.close()
            self._check_place()
            self._complete(status, message)
        finally:
            self._lock.release()

    def _complete(self, status: str, message: str | None) -> None:
        tables: dict[str, dict[str, Any]] = {}
        number = self._manifest.number
        try:
            for table in TABLES:
                stream = read_stream(self._streams[table].path, self._schemas[table])
                tables[table] = complete_table(self._folder, table, stream, self.numbers, number=number)
            self.update_manifest(status=status, message=message, ended=now(), tables=tables)
        except Exception as error:
            self._stay_live(tables, message, error)
            if isinstance(error, LinchainError):
                raise
            raise RunError(
                str(self.path),
                expected="its tables to become Parquet",
                got=f"{type(error).__name__}: {error}",
                do="free some space if that is what lacks; the run can be read as it is, from its streams",
            ) from error
        self._ended = True
        for writer in self._streams.values():
            writer.path.unlink(missing_ok=True)

    def _stay_live(self, tables: Mapping[str, Mapping[str, Any]], message: str | None, error: Exception) -> None:
        """Leave the streams as the run's tables, and say so if that can still be written."""
        for entry in tables.values():
            with contextlib.suppress(OSError):
                (self._folder / str(entry["file"])).unlink(missing_ok=True)
        said = f"{message}; " if message else ""
        with contextlib.suppress(Exception):
            self.update_manifest(
                status="failed", message=f"{said}its tables could not become Parquet ({error})", ended=now()
            )

    def _check_place(self) -> None:
        for stream in self._streams.values():
            stream.check_place()

    def _open_streams(self) -> None:
        try:
            for table, schema in self._schemas.items():
                path = self._folder / stream_name(table, self._manifest.number)
                self._streams[table] = StreamWriter(path, schema)
        except OSError as error:
            if isinstance(error, FileExistsError):  # another writer, where the file system has no locks
                raise RunError(
                    str(self.path), expected="no run", got=f"{error.filename}", do="choose another folder"
                ) from error
            raise

    def _write_manifest(self, *, part_name: str = f"{MANIFEST}.part") -> None:
        with self._manifest_guard:
            if self._streams:
                self._streams["steps"].check_place()  # the folder of that name may be somebody else's by now
            for _ in range(_MOST_REWRITES):
                writing = self._manifest, self._marked
                write_manifest(self._folder, self.manifest, part_name=part_name)
                if writing[0] is self._manifest and writing[1] is self._marked:
                    break  # else a signal came meanwhile, whose mark must not be undone
            with contextlib.suppress(OSError):
                size = (self._folder / MANIFEST).stat().st_size
                self.bytes_written += size - self._manifest_bytes
                self._manifest_bytes = size


def append_evals(path: str | Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Add evaluations to a run that has ended.

    Args:
        path: The run folder.
        columns: `step`, `split`, `metric` and `value`, of one length.

    Raises:
        RunError: It has not ended, or its tables could not be completed.
    """
    folder = Path(path)
    read_manifest(folder)
    with RunLock(folder, patience_seconds=_EVALS_PATIENCE_SECONDS):
        manifest = read_manifest(folder)
        if "evals" not in manifest.tables:
            raise RunError(str(folder), expected="a run that has ended", got=manifest.status, do="use its writer")
        old = read_parquet(folder, manifest.tables["evals"])
        new = pa.Table.from_pydict(to_arrow("evals", LIVE["evals"], columns, {}), schema=LIVE["evals"])
        # Under a name of its own, so that a process that dies here leaves manifest and file in agreement.
        former = str(manifest.tables["evals"]["file"])
        number = int(former.removesuffix(".parquet").rpartition("-")[2] or 1) + 1 if "-" in former else 2
        entry = write_parquet(folder / parquet_name("evals", number), pa.concat_tables([old, new]))
        write_manifest(folder, replace(manifest, tables={**manifest.tables, "evals": entry}))
        (folder / former).unlink(missing_ok=True)


def _run_files() -> list[str]:
    return [MANIFEST, *(stream_name(table) for table in TABLES), *(parquet_name(table) for table in TABLES)]
