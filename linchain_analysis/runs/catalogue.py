"""Many runs: find them, list them, read them together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd

from linchain_analysis.errors import RunError
from linchain_analysis.runs.frames import Frames
from linchain_analysis.runs.manifest import MANIFEST
from linchain_analysis.runs.reader import Run, load_run

_LABELS = ("method", "problem", "base_learning_rate", "init_seed", "data_seed")


def find_runs(path: str | Path) -> list[Path]:
    """Return the run folders at and under `path`, sorted by name.

    Raises:
        RunError: There is no such folder.
    """
    root = Path(path)
    if not root.is_dir():
        raise RunError(str(root), expected="a folder with runs", got="no such folder", do="check the path")
    return sorted(Path(folder) for folder, _, files in os.walk(root) if MANIFEST in files)


def load_runs(paths: Sequence[str | Path | Run] | str | Path, *, damaged: str = "raise") -> RunSet:
    """Open several runs.

    Args:
        paths: Run folders, opened runs, or folders under which runs are; one of them or a list.
        damaged: As in `load_run`.

    Raises:
        RunError: A path under which there is no run.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    runs: list[Run] = []
    for item in given:
        if isinstance(item, Run):
            runs.append(item)
            continue
        found = find_runs(item)
        if not found:
            raise RunError(str(item), expected="a folder with runs", got="none under it", do="check the path")
        runs += [load_run(folder, damaged=damaged) for folder in found]
    unique = {run.path.resolve(): run for run in runs}
    return RunSet(list(unique.values()))


class RunSet(Frames, Sequence[Run]):
    """Several runs, whose tables can be read as one."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self.names = _names(self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.runs[index]

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    @cached_property
    def catalogue(self) -> pd.DataFrame:
        """One row per run: its labels, status, number of steps and folder."""
        rows = [
            {
                "run": name,
                **{label: getattr(run, label) for label in _LABELS},
                "status": run.status,
                "num_steps": run.num_steps,
                "path": str(run.path),
            }
            for name, run in zip(self.names, self.runs, strict=True)
        ]
        return pd.DataFrame(rows, columns=["run", *_LABELS, "status", "num_steps", "path"])

    def read(self, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read `columns` of `table` of all runs, with the labels of each run in front."""
        parts = []
        for name, run in zip(self.names, self.runs, strict=True):
            frame = run.read(table, columns)
            for position, (label, value) in enumerate(
                [("run", name), *((label, getattr(run, label)) for label in _LABELS)]
            ):
                frame.insert(position, label, value)
            parts.append(frame)
        whole = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["run", *_LABELS])
        for name in ("run", "method", "problem", "module", "factor", "kind"):
            if name in whole and whole[name].notna().any():
                whole[name] = whole[name].astype("category")
        return whole


def _names(runs: Sequence[Run]) -> list[str]:
    """Folder names relative to the common parent of all runs."""
    folders = [run.path.resolve() for run in runs]
    if len(folders) < 2:
        return [folder.name for folder in folders]
    parent = os.path.commonpath([str(folder.parent) for folder in folders])
    return [folder.relative_to(parent).as_posix() for folder in folders]
