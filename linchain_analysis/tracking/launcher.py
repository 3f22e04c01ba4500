"""Run somebody else's training script unchanged, with the tracker alongside."""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import wrapt

from linchain_analysis.errors import InputError
from linchain_analysis.tracking.mirrors import check_mirrors
from linchain_analysis.tracking.presets import SAMPLE_EVERY, check_intervals, check_patterns, find_preset, select
from linchain_analysis.tracking.schedule import parse_every

if TYPE_CHECKING:
    from linchain_analysis.tracking.tracker import Tracker


@dataclass(frozen=True)
class Recording:
    """What is recorded of a launched script, as `Tracker` takes it."""

    preset: str | None = None
    every: int | str = "auto"
    measures: tuple[str, ...] | None = None
    sample_every: int = SAMPLE_EVERY
    snapshot_every: int | None = None
    include: str | None = None
    exclude: str | None = None
    report_to: tuple[str, ...] = ()


def check(target: str, *, is_module: bool, out: Path | None, recording: Recording) -> None:
    """Refuse what cannot be meant before anything runs.

    Raises:
        InputError: There is no such script, preset, measure, schedule or mirror, or a pattern is none.
    """
    if not is_module and not Path(target).is_file():
        raise InputError("SCRIPT", expected="a Python file", got=target, do="check the path, or use -m for a module")
    if out is not None and out.exists() and not out.is_dir():
        raise InputError("--out", expected="a folder, or a name that is free", got=f"the file {out}", do="name another")
    if recording.preset is not None:
        find_preset(recording.preset)
    if recording.measures is not None:  # which takes loading them
        select(recording.preset, recording.measures)
    parse_every(recording.every)
    check_intervals(recording.sample_every, recording.snapshot_every)
    check_patterns(recording.include, recording.exclude)
    check_mirrors(recording.report_to)


def launch(target: str, arguments: Sequence[str], *, is_module: bool, out: Path | None, recording: Recording) -> None:
    """Run `target` as `python` would, and track what it trains.

    How the script ends (`SystemExit`, an exception, an interrupt) goes on to the caller.

    Args:
        target: Path of a script, or name of a module.
        arguments: What the script sees in `sys.argv[1:]`.
        is_module: Whether `target` is a module (`python -m`).
        out: The run folder; `runs/<name of the script>-<time>` where it is not said. A second optimiser's run gets
            the same name with `-2`.
        recording: What is recorded.
    """
    name = target.rpartition(".")[2] if is_module else Path(target).stem
    folder = (out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    session = _Session(folder, recording)
    # Only once the script itself imports torch: one that prints its help and ends stays fast.
    wrapt.when_imported("torch")(lambda _: session.start())
    sys.argv = [target, *arguments]
    try:
        if is_module:
            sys.path[0] = os.getcwd()
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            _run_script(Path(target))
    except BaseException as error:
        session.end(error)
        _hide_own_frames()
        raise
    session.end(None)


def _run_script(path: Path) -> None:
    """Run a script as the interpreter does: as the module `__main__`, which stays after it has run."""
    absolute = str(path.absolute())
    sys.path[0] = str(path.resolve().parent)
    main = types.ModuleType("__main__")
    main.__file__ = absolute
    main.__builtins__ = builtins  # type: ignore[attr-defined]
    main.__loader__ = SourceFileLoader("__main__", absolute)
    sys.modules["__main__"] = main
    with io.open_code(absolute) as file:
        # Not with the future statements of this file.
        code = compile(file.read(), absolute, "exec", dont_inherit=True)
    exec(code, main.__dict__)


def _hide_own_frames() -> None:
    """Let an exception that nobody catches be printed as without the launcher, by whatever hook the script has set."""
    shown_by = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        error.__traceback__ = _from_script(trace)
        shown_by(kind, error, error.__traceback__)

    sys.excepthook = show


class _Session:
    """The trackers of one launched script."""

    def __init__(self, folder: Path, recording: Recording) -> None:
        self._folder = folder
        self._recording = recording
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
            if error is None:
                _say("the script did not import torch; nothing was tracked.")
            return
        self._discovery.close()
        for tracker in self._discovery.trackers:
            tracker.end(error)  # says itself how many steps are where, and what they cost
            if not tracker.num_steps:
                _say(f"0 steps in {tracker.path}")
        if not self._discovery.trackers:
            _say(
                "expected an optimiser that trains a PEFT adapter, found none; nothing was tracked. "
                "The script itself ran as without tracking."
            )

    def _make_tracker(self, model: Any, optimizer: Any, number: int) -> Tracker:
        from linchain_analysis.tracking.resumption import number_path
        from linchain_analysis.tracking.tracker import Tracker

        tracker = Tracker(model, optimizer, number_path(self._folder, number), **vars(self._recording))
        _say(f"tracking into {tracker.path}")
        return tracker


def _from_script(trace: TracebackType | None) -> TracebackType | None:
    """Drop the frames before the script's own."""
    ours = (str(Path(__file__).parents[1]), "<frozen runpy>", runpy.__file__)
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(ours):
        trace = trace.tb_next
    return trace


def _say(message: str) -> None:
    """Say something beside the script's own output."""
    print(f"linchain_analysis: {message}", file=sys.stderr)
