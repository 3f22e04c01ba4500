"""What has been read of one run so far, whichever way it was read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from linchain_analysis.errors import DamageError
from linchain_analysis.runs.derived import derive
from linchain_analysis.runs.manifest import MANIFEST, Manifest, numbers_of
from linchain_analysis.watching.findings import FindingsSoFar
from linchain_analysis.watching.modules import RanksSoFar, RatiosSoFar
from linchain_analysis.watching.steps import COLUMNS, StepsSoFar
from linchain_analysis.watching.view import NAN, Evaluation

# Which columns of which tables. Steps stand before what counts only with them: when the others are read, the rows of
# every step that was read are there.
FOLLOWED: Mapping[str, tuple[str, ...]] = {
    "steps": COLUMNS,
    "scalars": ("step", "name", "value"),
    "modules": ("step", "module", "spectrum", "effective_rank"),
    "factors": ("step", "module", "factor", "update_ratio"),
    "evals": ("step", "split", "metric", "value"),
    "health": ("step", "finding", "subject", "began", "message"),
}


_RESTORE = "restore the file from a copy"


class Collected:
    """Collects the rows of one run as they are stored, in a stream or in Parquet, in the order of their steps.

    Args:
        manifest: What the run says of itself.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._numbers = numbers_of(manifest)
        self.steps = StepsSoFar()
        self.ranks = RanksSoFar(manifest.modules)
        self.ratios = RatiosSoFar(manifest.modules, list(self._numbers["factor"]))
        self.findings = FindingsSoFar()
        self.evals: dict[tuple[str, str], Evaluation] = {}

    def add(self, table: str, rows: pa.Table, *, more: bool = False, fresh: bool = False) -> None:
        """Add rows that have at least the columns of `FOLLOWED` that are stored.

        Args:
            table: Which table.
            rows: What follows what was added before.
            more: Whether further rows, maybe of the last step of these, are at hand.
            fresh: Whether they are the first of a training that went on from a checkpoint.
        """
        finished = self.steps.finished
        if more and len(rows) and table in ("modules", "factors"):
            finished = finished[finished < rows["step"][-1].as_py()]
        if table == "steps":
            self.steps.add({name: _floats(rows[name]) for name in COLUMNS})
        elif table == "scalars":
            self.steps.add_scalars(*(rows[name].to_pylist() for name in FOLLOWED[table]))
        elif table == "modules":
            # Stored once a run is complete, and computed alike before.
            stored = "effective_rank" in rows.column_names
            ranks = _floats(rows["effective_rank"]) if stored else derive(rows, ["effective_rank"])["effective_rank"]
            keys = {"step": rows["step"].to_numpy(), "module": self._numbers_in(rows, "module")}
            self.ranks.add({**keys, "effective_rank": ranks}, finished)
        elif table == "factors":
            keys = {name: self._numbers_in(rows, name) for name in ("module", "factor")}
            ratios = _floats(rows["update_ratio"])
            self.ratios.add({"step": rows["step"].to_numpy(), **keys, "update_ratio": ratios}, finished)
        elif table == "evals":
            for step, split, metric, value in zip(*(rows[name].to_pylist() for name in FOLLOWED[table]), strict=True):
                self.evals[split, metric] = Evaluation(split, metric, step, NAN if value is None else value)
        elif table == "health":
            if fresh:
                self.findings.forget()
            self.findings.add(*(rows[name].to_pylist() for name in FOLLOWED[table]))

    def _numbers_in(self, rows: pa.Table, name: str) -> NDArray[np.integer]:
        """Return the numbers in the manifest of a column of modules or factors."""
        column = rows[name]
        if not pa.types.is_dictionary(column.type):
            numbers: NDArray[np.integer] = column.to_numpy()
            # Where modules were declared after the manifest was read, the next look finds them in it.
            if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self._numbers[name]):
                raise DamageError(
                    MANIFEST, expected=f"every {name} in it", got=f"rows of number {numbers.max()}", do=_RESTORE
                )
            return numbers
        parts = [
            np.array([self._numbers[name][said] for said in chunk.dictionary.to_pylist()], dtype=np.int32)[
                chunk.indices.to_numpy(zero_copy_only=False)
            ]
            for chunk in column.chunks
            if len(chunk)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """A stored column as float64, NaN for null."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    values: NDArray[np.float64] = column.cast(pa.float64(), safe=False).to_numpy()
    return values
