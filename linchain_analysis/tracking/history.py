"""What a run that goes on holds already, as far as it decides what is recorded of its next steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.runs import Run


@dataclass(frozen=True)
class History:
    """What a run holds of the steps that stand.

    Attributes:
        recorded: Which of its steps were recorded whole.
        num_bytes: What its tables but snapshots take on the disk; what is superseded stays there, so it counts.
        snapshot_sizes: Bytes of its snapshots, by step.
        noise: (n, 2), estimates of |G|² and tr Σ of each of its steps; empty where none were made.
    """

    recorded: tuple[int, ...] = ()
    num_bytes: int = 0
    snapshot_sizes: Mapping[int, int] = field(default_factory=dict)
    noise: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))


def read_history(run: Run, until: int) -> History:
    """Return what `run` holds of its steps up to `until`."""
    recorded = np.unique(run.read("modules", ["step", "module"])["step"].to_numpy())
    return History(
        recorded=tuple(int(step) for step in recorded[recorded <= until]),
        num_bytes=_table_bytes(run.path),
        snapshot_sizes=_snapshot_sizes(run, until),
        noise=_noise(run, until),
    )


def _table_bytes(folder: Path) -> int:
    tables = [path for path in folder.iterdir() if path.suffix in (".arrows", ".parquet")]
    return sum(path.stat().st_size for path in tables if not path.name.startswith("snapshots"))


def _snapshot_sizes(run: Run, until: int) -> dict[int, int]:
    rows = run.read("snapshots", ["step", "tensors"])
    sizes: dict[int, int] = {}
    for step, tensors in zip(rows["step"], rows["tensors"], strict=True):
        if step <= until:
            sizes[int(step)] = sizes.get(int(step), 0) + len(tensors)
    return sizes


def _noise(run: Run, until: int) -> NDArray[np.float64]:
    names = ["noise_gradient_square", "noise_trace"]
    steps = run.steps
    if any(name not in steps for name in names):
        return np.zeros((0, 2))
    return steps.loc[steps["step"] <= until, names].to_numpy(dtype=np.float64)
