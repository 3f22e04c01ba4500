"""What stands at a path: an adapter, a folder of several, or a run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from linchain_analysis.auditing.saved import CONFIG, SavedAdapter, read_adapter
from linchain_analysis.errors import InputError
from linchain_analysis.runs.manifest import MANIFEST


def is_run(path: Path) -> bool:
    """Return whether a run folder stands there."""
    return (path / MANIFEST).is_file()


def read_adapters(paths: Sequence[Path]) -> list[SavedAdapter]:
    """Read the adapters at `paths`, each an adapter's folder or one that holds several, such as checkpoints.

    Each is called by the shortest end of its path that no other has.

    Raises:
        InputError: A path holds no adapter.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _find(path)))
    names = _names([folder.resolve() for folder in folders])
    return [read_adapter(folder, name) for folder, name in zip(folders, names, strict=True)]


def _find(path: Path) -> list[Path]:
    if (path / CONFIG).is_file():
        return [path]
    found = sorted((file.parent for file in path.rglob(CONFIG)), key=_natural) if path.is_dir() else []
    if not found:
        got = f"no {CONFIG} in it or below" if path.is_dir() else "a file" if path.exists() else "no such folder"
        raise InputError(
            str(path), expected="the folder of a PEFT adapter, or a run folder", got=got, do="check the path"
        )
    return found


def _natural(path: Path) -> list[tuple[str, int]]:
    """Sort key under which checkpoint-200 stands before checkpoint-1000."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"([^\d]*)(\d*)", str(path))]


def _names(folders: Sequence[Path]) -> list[str]:
    for length in range(1, 64):
        names = [os.sep.join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names
