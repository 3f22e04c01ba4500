"""Show runs in a terminal until they have ended."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live

from linchain_analysis.errors import InputError
from linchain_analysis.runs.manifest import MANIFEST
from linchain_analysis.watching.frame import draw_frame, draw_waiting, glyphs_of
from linchain_analysis.watching.gathering import Gathering
from linchain_analysis.watching.glyphs import Glyphs
from linchain_analysis.watching.status import tell_progress
from linchain_analysis.watching.view import RunView
from linchain_analysis.watching.wording import tell_number, tell_speed

_FIRST_SECONDS = 0.7  # then what has been read so far is shown
_LINE_SECONDS = 10.0  # between two lines where a screen cannot be drawn anew
_NEXT_RUN_SECONDS = 10.0  # how long after its last run a sweep may begin the next one


def show_once(paths: Sequence[Path], console: Console) -> bool:
    """Print one frame; return whether any run could be read.

    Raises:
        InputError: There is a path without a run.
    """
    gathering = Gathering(paths)
    views = gathering.look()
    missing = gathering.empty()
    if missing:
        raise InputError(
            ", ".join(missing), expected="a run folder, or a folder with runs", got="no run in it", do="check the path"
        )
    console.print(draw_frame(views, console.width, None, glyphs_of(console)))
    return _any_readable(views)


def show_live(paths: Sequence[Path], console: Console, refresh_seconds: float) -> bool:
    """Show frames until every run has ended; return whether any run could be read."""
    gathering = Gathering(paths)
    screen = _Lines(console) if console.is_dumb_terminal else _Screen(console)
    last_running = -math.inf
    with screen:
        while True:
            began = time.monotonic()
            views = gathering.look(_FIRST_SECONDS)
            missing = gathering.empty()
            screen.show(views, missing)
            if any(view.status == "reading" for view in views):
                continue
            if any(not view.is_over for view in views):
                last_running = time.monotonic()
            elif views and not missing and _is_final(paths, last_running):
                screen.show_last(views)
                return _any_readable(views)
            # A look that takes long, at many runs or over a slow network, is followed by as long a rest.
            took = time.monotonic() - began
            time.sleep(max(refresh_seconds - took, took, 0.05))


def _is_final(paths: Sequence[Path], last_running: float) -> bool:
    """Whether no other run will follow: a folder of runs may be that of a sweep that is about to begin its next one."""
    is_run = all((path / MANIFEST).is_file() for path in paths)
    return is_run or time.monotonic() - last_running > _NEXT_RUN_SECONDS


def _any_readable(views: Sequence[RunView]) -> bool:
    return any(view.status not in ("damaged", "unreadable") for view in views)


class _Screen:
    """Draws each frame in the place of the one before, without leaving the screen that the shell uses."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> _Screen:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, views: Sequence[RunView], missing: Sequence[str]) -> None:
        """Draw a frame."""
        width, height = self._console.size
        glyphs = glyphs_of(self._console)
        if not views:
            self._live.update(draw_waiting(missing, width, glyphs), refresh=True)
            return
        # One line stays free: the cursor stands below the frame.
        self._live.update(draw_frame(views, width, max(height - 1, 1), glyphs, missing=missing), refresh=True)

    def show_last(self, views: Sequence[RunView]) -> None:
        """Leave a last frame, as high as it takes: nothing has to be drawn over it."""
        self._live.update(draw_frame(views, self._console.width, None, glyphs_of(self._console)))


class _Lines:
    """Prints a line for each run from time to time, where nothing can be drawn over."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._due = 0.0
        self._said: dict[str, str] = {}

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, views: Sequence[RunView], missing: Sequence[str]) -> None:
        """Print what is new since the last line."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _LINE_SECONDS
        glyphs = glyphs_of(self._console)
        lines = {view.name: _summary(view, glyphs_of(self._console)) for view in views}
        if not views:
            lines = {"": str(draw_waiting(missing, self._console.width, glyphs))}
        for name, line in lines.items():
            if self._said.get(name) != line:
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._said = lines

    def show_last(self, views: Sequence[RunView]) -> None:
        """Print a whole frame."""
        self._console.print(draw_frame(views, self._console.width, None, glyphs_of(self._console)))


def _summary(view: RunView, glyphs: Glyphs) -> str:
    """One run in one line."""
    if not view.steps.num_rows:
        return glyphs.clean(f"{view.name}: {view.status}" + (f", {view.message}" if view.message else ""))
    speed = tell_speed(view.steps.steps_per_second, glyphs)
    loss = f"loss {tell_number(view.steps.loss_mean)}"
    return glyphs.clean(f"{view.name}: {view.status}, step {tell_progress(view)}, {loss}, {speed}")
