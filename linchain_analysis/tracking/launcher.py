"""Run somebody else's training script unchanged, with the tracker alongside."""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import wrapt

from linchain_analysis.errors import InputError
from linchain_analysis.tracking.presets import find_preset
from linchain_analysis.tracking.schedule import parse_every

if TYPE_CHECKING:
    from linchain_analysis.tracking.tracker import Tracker


def launch(
    target: str, arguments: Sequence[str], *, is_module: bool, out: Path | None, preset: str, every: int | str
) -> int:
    """Run `target` as `python` would, track what it trains, and return its exit status.

    Args:
        target: Path of a script, or name of a module.
        arguments: What the script sees in `sys.argv[1:]`.
        is_module: Whether `target` is a module (`python -m`).
        out: The run folder; `runs/<name of the script>-<time>` where it is not said. A second optimiser's run gets
            the same name with `-2`.
        preset: As in `Tracker`.
        every: As in `Tracker`.

    Raises:
        InputError: There is no such script, preset or schedule.
    """
    if not is_module and not Path(target).is_file():
        raise InputError("SCRIPT", expected="a Python file", got=target, do="check the path, or use -m for a module")
    find_preset(preset)
    parse_every(every)
    name = target.rpartition(".")[2] if is_module else Path(target).stem
    folder = (out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    session = _Session(folder, preset, every)
    # Only once the script itself imports torch: one that prints its help and ends stays fast.
    wrapt.when_imported("torch")(lambda _: session.start())
    sys.argv = [target, *arguments]
    try:
        if is_module:
            sys.path[0] = os.getcwd()
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(target).resolve().parent)
            runpy.run_path(target, run_name="__main__")
    except SystemExit as end:
        session.end(end)
        raise
    except KeyboardInterrupt as end:
        session.end(end)
        raise
    except BaseException as error:
        session.end(error)
        # As Python itself would print it: without the frames of this launcher.
        error.__traceback__ = _from_script(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    session.end(None)
    return 0


class _Session:
    """The trackers of one launched script."""

    def __init__(self, folder: Path, preset: str, every: int | str) -> None:
        self._folder = folder
        self._preset = preset
        self._every = every
        self._process = os.getpid()
        self._discovery: Any = None

    def start(self) -> None:
        """Begin to look for optimisers."""
        from linchain_analysis.tracking.discovery import Discovery

        self._discovery = Discovery(self._make_tracker)

    def end(self, error: BaseException | None) -> None:
        """Close every tracker with how the script ended, and say where the runs are."""
        if os.getpid() != self._process:  # a worker that the script forked
            return
        if self._discovery is None:
            _say("the script did not import torch; nothing was tracked.")
            return
        self._discovery.close()
        for tracker in self._discovery.trackers:
            tracker.end(error)
            _say(f"{tracker.num_steps} steps in {tracker.path}")
        if not self._discovery.trackers:
            _say(
                "expected an optimiser that trains a PEFT adapter, found none; nothing was tracked. "
                "The script itself ran as without tracking."
            )

    def _make_tracker(self, model: Any, optimizer: Any, number: int) -> Tracker:
        from linchain_analysis.tracking.discovery import numbered
        from linchain_analysis.tracking.tracker import Tracker

        tracker = Tracker(model, optimizer, numbered(self._folder, number), preset=self._preset, every=self._every)
        _say(f"tracking into {tracker.path}")
        return tracker


def _from_script(trace: TracebackType | None) -> TracebackType | None:
    """Drop the frames before the script's own."""
    ours = {__file__, runpy.__file__, "<frozen runpy>"}
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    return trace


def _say(message: str) -> None:
    """Say something beside the script's own output."""
    print(f"linchain_analysis: {message}", file=sys.stderr)
