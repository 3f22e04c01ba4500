"""What stands at a path: an adapter, a folder of several, or a run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from linchain_analysis.auditing.saved import CONFIG, SavedAdapter, natural_key, read_adapter
from linchain_analysis.errors import InputError
from linchain_analysis.runs.manifest import MANIFEST

# Names that say nothing without the folder above; those with a number tell the adapters of one folder apart.
_PLAIN = re.compile(r"(adapter|adapter[-_]model|best|default|final|last)s?")
_NUMBERED = re.compile(r"(adapter|checkpoint|epoch|step)[-_]?\d+|checkpoints?")


def is_run(path: Path) -> bool:
    """Return whether a run folder stands there."""
    return (path / MANIFEST).is_file()


def read_adapters(paths: Sequence[Path]) -> list[SavedAdapter]:
    """Read the adapters at `paths`, each an adapter's folder or one that holds several, such as checkpoints.

    Each is called by the shortest end of its path that no other has, and that is more than `adapter`.

    Raises:
        InputError: A path holds no adapter.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _find(path)))
    names = _names([folder.resolve() for folder in folders])
    return [read_adapter(folder, name) for folder, name in zip(folders, names, strict=True)]


def name_folder(path: Path, measures: Sequence[str] = ()) -> Path:
    """Return the folder `audit-NAME[-MEASURE…]` for the tables.

    Args:
        path: What is audited; NAME is the end of it.
        measures: Names of measures, or files of them, that are applied to a run.
    """
    parts = [*_end(path.resolve()), *(Path(name).stem if name.endswith(".py") else name for name in measures)]
    return Path("-".join(["audit", *dict.fromkeys(parts)]))


def find_free(folder: Path) -> Path:
    """Return a folder, or the first of `folder-2`, `folder-3`, … where it holds something already."""
    candidates = (folder, *(folder.with_name(f"{folder.name}-{number}") for number in range(2, 10_000)))
    return next(one for one in candidates if not one.exists() or (one.is_dir() and not any(one.iterdir())))


def _end(path: Path) -> list[str]:
    """The last part of a path, with the one before it where the last says nothing alone."""
    vague = _PLAIN.fullmatch(path.name) or _NUMBERED.fullmatch(path.name)
    return [path.parent.name, path.name] if vague and path.parent.name else [path.name]


def _find(path: Path) -> list[Path]:
    if (path / CONFIG).is_file():
        return [path]
    found = (
        sorted((file.parent for file in path.rglob(CONFIG)), key=lambda folder: natural_key(str(folder)))
        if path.is_dir()
        else []
    )
    if not found:
        got = f"no {CONFIG} in it or below" if path.is_dir() else "a file" if path.exists() else "no such folder"
        raise InputError(
            str(path), expected="the folder of a PEFT adapter, or a run folder", got=got, do="check the path"
        )
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    shortest = len(_end(folders[0])) if len(folders) == 1 else 1
    if any(_PLAIN.fullmatch(folder.name) for folder in folders):
        shortest = 2
    for length in range(shortest, 64):
        names = [os.sep.join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names
