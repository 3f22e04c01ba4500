"""Read a run: live or complete, whole tables or some columns of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa

from linchain_analysis.errors import DamageError, InputError, RunError
from linchain_analysis.runs.conversion import make_frame, map_to_categories, map_to_numbers, to_columns
from linchain_analysis.runs.derived import derive, sources_of
from linchain_analysis.runs.frames import READABLE, Frames
from linchain_analysis.runs.lock import is_locked
from linchain_analysis.runs.manifest import Manifest, numbers_of, read_manifest
from linchain_analysis.runs.parts import Part, named, parts_of, read_part, schema_of
from linchain_analysis.runs.pieces import Piece, join_pieces
from linchain_analysis.runs.process import is_here, is_running
from linchain_analysis.runs.schema import BY_STEP, tables_of
from linchain_analysis.vocabulary import columns_of, measured_columns

# A run that is completed or resumed while it is read is read again; one that changes more often than this is odd.
_NUM_ATTEMPTS = 5

T = TypeVar("T")


def load_run(path: str | Path, *, damaged: str = "raise") -> Run:
    """Open a run folder.

    Args:
        path: The folder. It may be complete, still being written, or left by a process that was killed.
        damaged: `raise`, or `drop` to read what is certainly right before the damage, with a warning.

    Raises:
        RunError: There is no run there, or its schema is newer than this reader.
        DamageError: What is stored is not what was written.
    """
    if damaged not in ("raise", "drop"):
        raise InputError("damaged", expected="raise or drop", got=repr(damaged), do="pass one of these")
    folder = Path(path)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise RunError(str(folder), expected="a run folder", got=got, do="check the path")
    return Run(folder, read_manifest(folder), drop_damage=damaged == "drop")


class Run(Frames):
    """One run. Its tables are pandas frames, read when they are first used and kept.

    Attributes:
        path: The run folder.
        manifest: What the run says of itself.
    """

    def __init__(self, path: Path, manifest: Manifest, *, drop_damage: bool = False) -> None:
        self.path = path
        self.manifest = manifest
        self._drop_damage = drop_damage

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, method={self.method!r}, problem={self.problem!r}, status={self.status!r})"

    @property
    def method(self) -> str | None:
        """What was trained."""
        return self.manifest.method

    @property
    def problem(self) -> str | None:
        """What was learned."""
        return self.manifest.problem

    @property
    def status(self) -> str:
        """`running`, `complete`, `failed` or `interrupted`."""
        return self.manifest.status

    @property
    def base_learning_rate(self) -> float | None:
        """Learning rate before scheduling."""
        return self.manifest.base_learning_rate

    @property
    def init_seed(self) -> int | None:
        """Seed of the initialisation."""
        return self.manifest.init_seed

    @property
    def data_seed(self) -> int | None:
        """Seed of the order of the data."""
        return self.manifest.data_seed

    @property
    def is_alive(self) -> bool | None:
        """Whether a process is writing the run now; None where that cannot be known from this machine.

        A run whose status is `running` and that is not alive has died without a word.
        """
        locked = is_locked(self.path)
        if locked:  # by its writer, unless evaluations are being added to what has ended
            return not read_manifest(self.path).tables
        process = self.manifest.process
        if self.manifest.ended is not None:
            return False
        if process is None or not is_here(process):
            return None
        return False if locked is not None else is_running(process)

    @property
    def num_steps(self) -> int:
        """How many steps have their row, without reading any table of a complete run."""
        entry = self.manifest.tables.get("steps")
        if entry is None:
            return len(self._retrying(self._step_numbers))
        return int(entry["num_rows"]) + sum(segment.num_steps for segment in self.manifest.segments)

    def read(self, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read `columns` of `table` (all of them by default), computing derived ones.

        Raises:
            InputError: A table or column that there is not.
            DamageError: What is stored is not what was written.
        """
        if table not in READABLE:
            raise InputError(
                "read", expected=f"a table among {', '.join(READABLE)}", got=repr(table), do="check the name"
            )
        frame = self._retrying(lambda: self._read_steps() if table == "steps" else self._read_rows(table, columns))
        if columns is None or list(frame.columns) == list(columns):
            return frame
        missing = [name for name in columns if name not in frame]
        if missing:
            known = dict.fromkeys([c.name for c in columns_of(table)] + self._schema(table).names + list(frame.columns))
            raise InputError(
                f"read {table}",
                expected=f"columns among {', '.join(known)}",
                got=", ".join(missing),
                do="check the name",
            )
        return frame[list(columns)]

    def _read_steps(self) -> pd.DataFrame:
        frame = make_frame(to_columns(self._stored("steps"), {}))
        scalars = make_frame(to_columns(self._stored("scalars"), {}))
        if len(scalars):
            scalars = scalars[scalars["step"].isin(frame["step"])]
            for name, said in scalars.groupby("name", sort=False, observed=True):
                last = said.drop_duplicates("step", keep="last").set_index("step")["value"]
                old = frame[name] if name in frame else pd.Series(np.nan, index=frame.index)
                frame[name] = old.astype("float64").mask(frame["step"].isin(last.index), frame["step"].map(last))
        return frame

    def _read_rows(self, table: str, columns: Sequence[str] | None) -> pd.DataFrame:
        derived = self._derived_columns(table, columns)
        # The steps first: of a run that is being written, every row of these is there by now.
        finished = self._step_numbers() if table in BY_STEP else None
        pieces = []
        for part in parts_of(self.manifest):
            kept = part.derived(table)  # computed when the part was completed
            wanted = None
            if columns is not None:
                sources = {source for name in derived if name not in kept for source in sources_of(name)}
                wanted = [*columns, *sources, "step", "module", *(("split", "metric") if table == "evals" else ())]
            rows, whole = self._read_part(table, part, wanted)
            if finished is not None:
                rows = _keep_steps(rows, finished)
            missing = [name for name in derived if name not in kept or name not in rows.column_names]
            pieces.append(Piece(rows, derive(rows, missing), kept & set(rows.column_names)))
            if not whole:
                break
        piece = join_pieces(pieces, table)
        found = self._to_columns(piece)
        if "module" in found:
            # Of the manifest, for convenience.
            records = self.manifest.modules
            if columns is None or "kind" in columns:
                found["kind"] = map_to_categories(found["module"], {record.module: record.kind for record in records})
            if columns is None or "layer" in columns:
                found["layer"] = map_to_numbers(found["module"], {record.module: record.layer for record in records})
        order = [c.name for c in columns_of(table)] if columns is None else columns
        shown = dict.fromkeys([name for name in order if name in found] + (list(found) if columns is None else []))
        return make_frame({name: found[name] for name in shown})

    def _to_columns(self, piece: Piece) -> dict[str, Any]:
        names = {column: list(numbers) for column, numbers in numbers_of(self.manifest).items()}
        rows = piece.rows.drop_columns([name for name in piece.computed if name in piece.rows.column_names])
        stored = to_columns(rows, names)
        kept = {name: stored[name].astype(np.float64) for name in piece.kept if name in stored}
        return {**stored, **kept, **piece.computed}

    def _derived_columns(self, table: str, columns: Sequence[str] | None) -> list[str]:
        """Which of the wanted columns follow from others; those of measures only if somebody asks for them."""
        derived = [c.name for c in columns_of(table) if c.derived and (columns is None or c.name in columns)]
        others = set(columns or ()) - set(self._schema(table).names) - set(derived)
        if others:
            derived += [c.name for c in measured_columns(table) if c.derived and c.name in others]
        return derived

    def _schema(self, table: str) -> pa.Schema:
        return schema_of(self.manifest, table)

    def _step_numbers(self) -> pa.Array:
        return self._stored("steps", ["step"])["step"].combine_chunks()

    def _stored(self, table: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Stored columns of a table of all parts."""
        found = []
        for part in parts_of(self.manifest):
            rows, whole = self._read_part(table, part, columns)
            found.append(rows)
            if not whole:
                break  # what follows a gap would look as if it followed what stands before
        return found[0] if len(found) == 1 else pa.concat_tables(found, promote_options="default")

    def _read_part(self, table: str, part: Part, columns: Sequence[str] | None) -> tuple[pa.Table, bool]:
        """Stored columns of a table of one part, modules and factors by name, and whether that is all of them."""
        if table not in tables_of(self.manifest.schema_version):
            return named(schema_of(self.manifest, table).empty_table(), self.manifest), True
        rows, whole = read_part(self.path, part, table, columns, drop_damage=self._drop_damage)
        if part.is_live(table):
            # Modules may have been declared after this run was opened.
            latest = read_manifest(self.path)
            moved = parts_of(latest) != parts_of(self.manifest)
            self.manifest = latest
            if moved:
                raise _MovedError
        return named(rows, self.manifest), whole

    def _retrying(self, read: Callable[[], T]) -> T:
        """Read what may be completed or resumed meanwhile: all of it as it was before, or all as it is now."""
        self._refresh()
        for _ in range(_NUM_ATTEMPTS):
            manifest = self.manifest
            try:
                return read()
            except _MovedError:
                continue
            except (DamageError, FileNotFoundError) as error:
                self.manifest = read_manifest(self.path)
                if self.manifest != manifest:
                    continue
                if isinstance(error, DamageError):
                    raise
                raise self._lost(f"no {Path(str(error.filename)).name}") from error
        raise self._lost("one that changes all the time")

    def _refresh(self) -> None:
        """Take notice of what became of a run that was written when it was opened, or that was moved on since."""
        parts = parts_of(self.manifest)
        tables = tables_of(self.manifest.schema_version)
        if self.manifest.ended is None or not all((self.path / parts[-1].file(table)).exists() for table in tables):
            self.manifest = read_manifest(self.path)

    def _lost(self, what: str) -> DamageError:
        return DamageError(
            str(self.path), expected="all tables of the run", got=what, do="restore the folder from a copy"
        )


class _MovedError(Exception):
    """The run was completed or resumed while it was read."""


def _keep_steps(rows: pa.Table, finished: pa.Array) -> pa.Table:
    """Leave out rows of steps that are not among `finished`."""
    steps, column = finished.to_numpy(), rows["step"]
    if len(steps) and len(rows) and not column.null_count and (np.diff(steps) == 1).all():
        limits = pa.compute.min_max(column).as_py()
        if steps[0] <= limits["min"] and limits["max"] <= steps[-1]:
            return rows  # as nearly always, and without a mask of millions of rows
    return rows.filter(pa.compute.is_in(column, finished.cast(column.type)))
