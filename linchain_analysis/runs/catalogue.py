"""Many runs: find them, list them, read them together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from linchain_analysis.errors import RunError
from linchain_analysis.runs.conversion import make_frame
from linchain_analysis.runs.frames import Frames
from linchain_analysis.runs.manifest import MANIFEST
from linchain_analysis.runs.reader import Run, load_run

_LABELS = ("method", "problem", "base_learning_rate", "init_seed", "data_seed")
_NAMED = ("run", "method", "problem")


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
        return self._labels().assign(
            status=[run.status for run in self.runs],
            num_steps=[run.num_steps for run in self.runs],
            path=[str(run.path) for run in self.runs],
        )

    def read(self, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read `columns` of `table` of all runs, with the labels of each run in front."""
        parts = _share_categories([run.read(table, columns) for run in self.runs])
        labels = self._labels()
        for name in _NAMED:
            if labels[name].notna().any():
                labels = labels.assign(**{name: labels[name].astype("category")})
        # Each row takes the labels of its run by number: millions of texts would have to be made and sorted otherwise.
        number = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        whole = parts[0] if len(parts) == 1 else pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
        of_rows = {name: labels[name].take(number).array for name in labels}
        return make_frame({**of_rows, **{name: whole[name] for name in whole if name not in of_rows}})

    def _labels(self) -> pd.DataFrame:
        """One row per run: what it is called, and its labels."""
        rows = [
            {"run": name, **{label: getattr(run, label) for label in _LABELS}}
            for name, run in zip(self.names, self.runs, strict=True)
        ]
        return pd.DataFrame(rows, columns=["run", *_LABELS])


def _share_categories(parts: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Give columns of categories the same categories in every part, so that they stay that when put together."""
    for name in ("module", "factor", "kind"):
        own = [part[name].dtype for part in parts if name in part]
        kinds = [kind for kind in own if isinstance(kind, pd.CategoricalDtype)]
        if len(kinds) < len(own):
            continue
        together = pd.CategoricalDtype(list(dict.fromkeys(category for kind in kinds for category in kind.categories)))
        if any(list(kind.categories) != list(together.categories) for kind in kinds):
            parts = [part.assign(**{name: part[name].astype(together)}) for part in parts]
    return parts


def _names(runs: Sequence[Run]) -> list[str]:
    """Folder names relative to the common parent of all runs."""
    folders = [run.path.resolve() for run in runs]
    if len(folders) < 2:
        return [folder.name for folder in folders]
    parent = os.path.commonpath([str(folder.parent) for folder in folders])
    return [folder.relative_to(parent).as_posix() for folder in folders]
