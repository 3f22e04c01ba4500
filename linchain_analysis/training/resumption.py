"""What of a grid stands in a folder already: complete runs are kept, half-finished ones are made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from linchain_analysis.errors import LinchainError, RunError
from linchain_analysis.runs import load_run
from linchain_analysis.runs.complete import UNFINISHED
from linchain_analysis.runs.lock import LOCK
from linchain_analysis.runs.schema import TABLES, parquet_name

_MANIFEST = "manifest.json"
# What `write_run` leaves when it is killed; `UNFINISHED` itself is what tells it from tables whose manifest was lost.
_UNFINISHED_TABLES = {f"{parquet_name(table)}{end}" for table in TABLES for end in ("", ".part")}


class Settings(Protocol):
    """Settings of a run."""

    def to_json(self) -> Mapping[str, Any]: ...  # noqa: D102


class Planned(Protocol):
    """A run of a grid: the name of its folder and its settings."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def settings(self) -> Settings: ...  # noqa: D102


PlannedT = TypeVar("PlannedT", bound=Planned)


@dataclass(frozen=True)
class Standing(Generic[PlannedT]):
    """Runs of a grid by what is to be done with them."""

    complete: tuple[PlannedT, ...]
    half_finished: tuple[PlannedT, ...]
    missing: tuple[PlannedT, ...]

    @property
    def to_do(self) -> tuple[PlannedT, ...]:
        """Runs that are still to be trained."""
        return (*self.half_finished, *self.missing)


def find_standing(runs: Sequence[PlannedT], out: Path) -> Standing[PlannedT]:
    """Sort runs, with their settings resolved, by what their folders in `out` hold. Nothing is changed there.

    Raises:
        RunError: If a folder of that name holds a run of other settings, or something that is no run.
    """
    found: dict[str, list[PlannedT]] = {"complete": [], "half_finished": [], "missing": []}
    for run in runs:
        found[_judge(run, out / run.name)].append(run)
    return Standing(*(tuple(found[key]) for key in ("complete", "half_finished", "missing")))


def _judge(run: Planned, folder: Path) -> str:
    if not folder.exists():
        return "missing"
    if folder.is_dir():
        held = {path.name for path in folder.iterdir()}
        if held <= {LOCK, UNFINISHED} or UNFINISHED in held <= {LOCK, UNFINISHED, *_UNFINISHED_TABLES}:
            return "half_finished"  # killed before its manifest was whole
    if not (folder / _MANIFEST).is_file():
        raise RunError(str(folder), expected="a run", got=f"something without {_MANIFEST}", do="move it away")
    try:
        manifest = load_run(folder).manifest
    except LinchainError as error:
        raise RunError(
            str(folder),
            expected="a run that can be read",
            got=str(error).rstrip("."),
            do="move it away to train it again",
        ) from error
    recorded: dict[str, Any] = dict(manifest.extra.get("settings", {}))
    planned = run.settings.to_json()
    other = [name for name, value in planned.items() if name not in recorded or recorded[name] != value]
    if other:
        raise RunError(
            str(folder),
            expected=", ".join(f"{name} {planned[name]!r}" for name in other),
            got=", ".join(f"{name} {recorded.get(name)!r}" for name in other),
            do="choose another output folder, or delete that run to train it again",
        )
    return "complete" if manifest.status == "complete" else "half_finished"


def refuse_other_problems(problem: str, out: Path) -> None:
    """Refuse a folder with runs of another problem: names of runs say method, rate and seed, and not what is learned.

    Raises:
        RunError: Some run in `out` learns something else.
    """
    for path in sorted(out.glob(f"*/{_MANIFEST}")):
        if path.parent.name.startswith("."):
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not of this grid, or it would have been refused before
        other = content.get("problem") if isinstance(content, dict) else None
        if other is not None and other != problem:
            raise RunError(
                str(out),
                expected=f"no runs but those of {problem}",
                got=f"{path.parent.name}, a run of {other}",
                do="choose another folder: runs of a sweep are named by method, learning rate and seed alone",
            )


def clear(folder: Path) -> None:
    """Delete a half-finished run, so that at no moment a part of it can be taken for a run.

    Its manifest goes last in effect: the folder is renamed out of the way in one step before anything is deleted.
    """
    aside = folder.with_name(f".{folder.name}.discarded")
    if aside.exists():
        shutil.rmtree(aside)  # left by a deletion that was cut short
    folder.rename(aside)
    shutil.rmtree(aside)
