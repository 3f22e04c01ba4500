"""Read a run: live or complete, whole tables or some columns of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from linchain_analysis.errors import DamageError, InputError, RunError
from linchain_analysis.runs.conversion import make_frame, map_to_categories, map_to_numbers, to_columns
from linchain_analysis.runs.derived import derive, sources_of
from linchain_analysis.runs.frames import FRAMES, Frames
from linchain_analysis.runs.manifest import Manifest, read_manifest
from linchain_analysis.runs.parquet import name_columns, read_parquet
from linchain_analysis.runs.schema import BY_STEP, live_schema, stream_name, tables_of
from linchain_analysis.runs.streams import read_stream
from linchain_analysis.runs.writer import numbers_of
from linchain_analysis.vocabulary import columns_of, measured_columns


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
    def num_steps(self) -> int:
        """How many steps have their row, without reading any table of a complete run."""
        entry = self.manifest.tables.get("steps")
        return int(entry["num_rows"]) if entry is not None else len(self._step_numbers())

    def read(self, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read `columns` of `table` (all of them by default), computing derived ones.

        Raises:
            InputError: A table or column that there is not.
            DamageError: What is stored is not what was written.
        """
        if table not in (*FRAMES, "snapshots"):
            raise InputError(
                "read", expected=f"a table among {', '.join(FRAMES)}", got=repr(table), do="check the name"
            )
        frame = self._read_steps() if table == "steps" else self._read_rows(table, columns)
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
        kept = set(self.manifest.tables.get(table, {}).get("derived", ()))  # computed when the run was completed
        wanted = None
        if columns is not None:
            sources = {source for name in derived if name not in kept for source in sources_of(name)}
            names = dict.fromkeys([*self._schema(table).names, *kept])
            wanted = [name for name in names if name in {*columns, *sources, "step", "module"}]
        # The steps first: of a run that is being written, every row of these is there by now.
        finished = self._step_numbers() if table in BY_STEP else None
        rows = self._stored(table, wanted)
        if finished is not None:
            rows = _keep_steps(rows, finished)
        computed = derive(rows, [name for name in derived if name not in kept or name not in rows.column_names])
        stored = to_columns(rows.drop_columns([name for name in computed if name in rows.column_names]), self._names())
        found = {**stored, **{name: stored[name].astype(np.float64) for name in kept if name in stored}, **computed}
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

    def _derived_columns(self, table: str, columns: Sequence[str] | None) -> list[str]:
        """Which of the wanted columns follow from others; those of measures only if somebody asks for them."""
        derived = [c.name for c in columns_of(table) if c.derived and (columns is None or c.name in columns)]
        others = set(columns or ()) - set(self._schema(table).names) - set(derived)
        if others:
            derived += [c.name for c in measured_columns(table) if c.derived and c.name in others]
        return derived

    def _names(self) -> dict[str, list[str]]:
        return {column: list(numbers) for column, numbers in numbers_of(self.manifest).items()}

    def _schema(self, table: str) -> pa.Schema:
        return live_schema(table, self.manifest.columns)

    def _step_numbers(self) -> pa.Array:
        return self._stored("steps", ["step"])["step"].combine_chunks()

    def _stored(self, table: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Stored columns of a table from Parquet or the live stream, modules and factors by name."""
        schema = self._schema(table)
        if table not in tables_of(self.manifest.schema_version):
            return name_columns(schema.empty_table(), numbers_of(self.manifest))
        for _ in range(2):
            entry = self.manifest.tables.get(table)
            if entry is not None:
                try:
                    return read_parquet(self.path, entry, columns)
                except DamageError as error:
                    if not self._drop_damage:
                        raise
                    warnings.warn(f"{error} Nothing of this table is read.", stacklevel=4)
                    return name_columns(schema.empty_table(), numbers_of(self.manifest))
            path = self.path / stream_name(table)
            try:
                rows = read_stream(path, schema, until_damage=self._drop_damage)
            except FileNotFoundError:
                # The run was completed after the manifest was read, or is not there.
                self.manifest = read_manifest(self.path)
                continue
            if self.manifest.ended is None:
                # Modules may have been declared after this run was opened.
                self.manifest = read_manifest(self.path)
            rows = name_columns(rows, numbers_of(self.manifest))
            return rows if columns is None else rows.select([name for name in columns if name in schema.names])
        raise DamageError(
            str(self.path), expected=f"the table {table}", got="no file of it", do="restore the folder from a copy"
        )


def _keep_steps(rows: pa.Table, finished: pa.Array) -> pa.Table:
    """Leave out rows of steps that are not among `finished`."""
    steps, column = finished.to_numpy(), rows["step"]
    if len(steps) and len(rows) and not column.null_count and (np.diff(steps) == 1).all():
        limits = pa.compute.min_max(column).as_py()
        if steps[0] <= limits["min"] and limits["max"] <= steps[-1]:
            return rows  # as nearly always, and without a mask of millions of rows
    return rows.filter(pa.compute.is_in(column, finished.cast(column.type)))
