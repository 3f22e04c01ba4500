"""Take in what a run folder holds, each row once, while files grow, end and are followed by others."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from linchain_analysis.errors import DamageError
from linchain_analysis.runs.manifest import MANIFEST, Manifest, read_manifest
from linchain_analysis.runs.parts import Part, parts_of, read_part
from linchain_analysis.runs.schema import live_schema, tables_of
from linchain_analysis.runs.tail import StreamTail
from linchain_analysis.watching.collecting import FOLLOWED, Collected

_YOUNG_SECONDS = 10.0  # the streams of a run are made right after its manifest


class Intake:
    """What has been read of the run in a folder.

    Args:
        path: The run folder.
        manifest: What the run says of itself now.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.collected = Collected(manifest)
        self.is_behind = False  # time was up before everything was read
        self._tails: dict[str, StreamTail] = {}
        self._settled: set[str] = set()  # tables of which all that cannot grow has been read

    def fits(self, manifest: Manifest) -> bool:
        """Whether what was read still counts: not if it is another run, or one that was resumed or has ended."""
        return _layout(manifest) == _layout(self.manifest)

    def read(self, deadline: float) -> None:
        """Read what is new.

        Args:
            deadline: On the monotonic clock; a long stream is left for the next call when it is over.

        Raises:
            DamageError: What is stored is not what was written.
            FileNotFoundError: A file is gone.
        """
        self.is_behind = False
        *earlier, last = parts_of(self.manifest)
        for table, columns in FOLLOWED.items():
            if table not in tables_of(self.manifest.schema_version):
                continue
            # A part that is over is read whole: it is in Parquet, or as long as a run was before it was resumed.
            fixed = [*earlier] if last.is_live(table) else [*earlier, last]
            if table not in self._settled:
                for part in fixed:
                    self.collected.add(table, read_part(self.path, part, table, columns)[0], fresh=part is last)
                self._settled.add(table)
            if last.is_live(table):
                self._follow(last, table, deadline)
            if self.is_behind:
                return  # the tables after this one count only with it

    def last_written(self) -> float | None:
        """Return when a step was last written, in seconds since the epoch; None where that is not known."""
        try:
            return os.stat(self._tails["steps"].path).st_mtime
        except (KeyError, FileNotFoundError):
            return None

    def _follow(self, part: Part, table: str, deadline: float) -> None:
        path = self.path / part.file(table)
        schema = live_schema(table, part.columns)
        tail = self._tails.get(table) or StreamTail(path, schema)
        try:
            if not self._tails.get(table):
                self.collected.add(table, schema.empty_table(), fresh=True)
            for rows in tail.pieces():
                self._tails[table] = tail
                self.collected.add(table, rows.combine_chunks(), more=True)
                if time.monotonic() > deadline:
                    self.is_behind = True
                    return
        except FileNotFoundError:
            if table in self._tails or self._has_begun(part):
                raise DamageError(
                    str(path), expected=f"the table {table}", got="no such file", do="restore it from a copy"
                ) from None
        else:
            self._tails[table] = tail
            self.collected.add(table, schema.empty_table())

    def _has_begun(self, part: Part) -> bool:
        """Whether all streams must be there: they are made right after the manifest, if the writer does not die."""
        is_old = time.time() - os.stat(self.path / MANIFEST).st_mtime > _YOUNG_SECONDS
        return is_old and any((self.path / part.file(table)).exists() for table in FOLLOWED)


def stamp_of(path: Path) -> object:
    """Return what changes when a manifest is written anew.

    Raises:
        FileNotFoundError: There is none.
    """
    status = os.stat(path / MANIFEST)
    return status.st_ino, status.st_mtime_ns, status.st_size


def open_intake(path: Path, former: Intake | None) -> Intake:
    """Return what was read so far, or a new beginning if it does not count any more."""
    manifest = read_manifest(path)
    if former is None or not former.fits(manifest):
        return Intake(path, manifest)
    former.manifest = manifest
    return former


def _layout(manifest: Manifest) -> tuple[Any, ...]:
    return (
        manifest.started,
        manifest.schema_version,
        manifest.modules,
        manifest.columns,
        manifest.segments,
        manifest.number,
        manifest.tables,
    )
