"""What a benchmark found, one number with its quartiles a row, and whether it meets its target."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from linchain_analysis.benchmarks.timing import Timings


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        name: `topic/what/size`.
        unit: `ratio`, or the unit of the measured value: `bytes`, `seconds`, `milliseconds`, `copies`, `groups`.
        median: Median over pairs, or the measured value; None where nothing was measured.
        q25: First quartile, the same as the median of a single value.
        q75: Third quartile.
        target: The most it may be; None where there is no target.
        extra: More about it for the JSON file, such as `clock` and `wall_ratio_median`.
        note: A remark for the reader, such as why nothing was measured.
    """

    name: str
    unit: str
    median: float | None
    q25: float | None
    q75: float | None
    target: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median keeps to the target; None where one of them is missing."""
        return None if self.target is None or self.median is None else bool(self.median <= self.target)

    def to_json(self) -> dict[str, Any]:
        """Return the row as the JSON file has it. The keys say `ratio` for values of any unit."""
        return {
            "name": self.name,
            "unit": self.unit,
            "ratio_median": self.median,
            "ratio_q25": self.q25,
            "ratio_q75": self.q75,
            "target": self.target,
            "met": self.met,
            **self.extra,
            **({"note": self.note} if self.note else {}),
        }


def summarise(
    name: str, values: ArrayLike, *, unit: str = "ratio", target: float | None = None, note: str = "", **extra: Any
) -> Row:
    """Return the median and quartiles (linear interpolation) of values of one unit, those not finite left out.

    Args:
        name: Name of the row.
        values: One value, or one for each pair.
        unit: Their unit.
        target: The most the median may be.
        note: A remark.
        **extra: More for the JSON file.
    """
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    finite = array[np.isfinite(array)]
    if not finite.size:
        return Row(name, unit, None, None, None, None, {"num_pairs": 0, **extra}, note or "nothing finite was measured")
    q25, median, q75 = (float(value) for value in np.percentile(finite, (25, 50, 75)))
    return Row(name, unit, median, q25, q75, target, {"num_pairs": int(finite.size), **extra}, note)


def compare(
    name: str, over: Timings, under: Timings, *, clock: str = "cpu", target: float | None = None, note: str = ""
) -> Row:
    """Return the ratio of two variants, pair by pair: over / under by `clock`, and beside it by both clocks.

    Args:
        name: Name of the row.
        over: The variant whose cost is in question.
        under: What it is compared with.
        clock: The clock that judges.
        target: The most the median ratio may be.
        note: A remark.
    """
    return summarise(
        name,
        over.by(clock) / under.by(clock),
        target=target,
        note=note,
        clock=clock,
        cpu_ratio_median=float(np.median(over.cpu / under.cpu)),
        wall_ratio_median=float(np.median(over.wall / under.wall)),
        over_seconds=float(np.median(over.by(clock))),
        under_seconds=float(np.median(under.by(clock))),
    )


def skip(name: str, why: str, unit: str = "ratio") -> Row:
    """Return a row that says why there is no result."""
    return Row(name, unit, None, None, None, note=f"skipped: {why}")


def write_rows(path: Path, rows: Sequence[Row], machine: str) -> None:
    """Write rows as a JSON list, each with the machine it was measured on."""
    content = [{**row.to_json(), "machine": machine} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
