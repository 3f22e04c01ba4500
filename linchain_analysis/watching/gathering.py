"""All runs that are watched, also those that are not there yet."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from linchain_analysis.errors import InputError, RunError
from linchain_analysis.runs.catalogue import find_runs
from linchain_analysis.runs.manifest import MANIFEST
from linchain_analysis.watching.following import RunFollower
from linchain_analysis.watching.view import RunView

_SEARCH_SHARE = 20  # a search waits so many times as long as the last one took


class Gathering:
    """Follows every run at and under some paths.

    Args:
        paths: Run folders, or folders that hold runs or are going to.

    Raises:
        InputError: A path is that of a file.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        files = [path for path in paths if path.exists() and not path.is_dir()]
        if files:
            raise InputError(str(files[0]), expected="a run folder", got="a file", do="check the path")
        self._paths = {path.resolve(): str(path) for path in paths}  # with what the user calls it
        self._followers: dict[Path, RunFollower] = {}
        self._search_again = 0.0

    def look(self, patience_seconds: float = math.inf) -> list[RunView]:
        """Return how every run stands that is there now.

        Args:
            patience_seconds: What has not been read by then is `reading`, and read at the next looks.
        """
        self._search()
        deadline = time.monotonic() + patience_seconds
        views = []
        for path, follower in list(self._followers.items()):
            try:
                if not follower.has_looked and time.monotonic() > deadline:
                    path.joinpath(MANIFEST).stat()  # it is there still
                    views.append(RunView(follower.name, "reading"))
                else:
                    views.append(follower.look(deadline))
            except FileNotFoundError:
                del self._followers[path]
                self._search_again = 0.0
        return views

    def empty(self) -> list[str]:
        """Return the paths that hold no run."""
        found = list(self._followers)
        return [
            said for path, said in self._paths.items() if not any(run == path or path in run.parents for run in found)
        ]

    def _search(self) -> None:
        began = time.monotonic()
        if began < self._search_again:
            return
        folders = list(dict.fromkeys(folder for path in self._paths for folder in _runs_at(path)))
        self._search_again = time.monotonic() + _SEARCH_SHARE * (time.monotonic() - began)
        if folders == list(self._followers):
            return
        names = _names(folders)
        self._followers = {
            folder: self._followers.get(folder) or RunFollower(folder, name)
            for folder, name in zip(folders, names, strict=True)
        }
        for follower, name in zip(self._followers.values(), names, strict=True):
            follower.name = name


def _runs_at(path: Path) -> list[Path]:
    """The run at a path, or the runs below it."""
    if (path / MANIFEST).is_file():
        return [path]
    try:
        return find_runs(path)
    except RunError:
        return []


def _names(folders: Sequence[Path]) -> list[str]:
    """What each run is called: its folder, from where the paths of all part."""
    if len(folders) < 2:
        return [folder.name for folder in folders]
    common = os.path.commonpath([str(folder.parent) for folder in folders])
    return [folder.relative_to(common).as_posix() for folder in folders]
