"""Run somebody else's training script unchanged, with the tracker alongside."""

from __future__ import annotations

import atexit
import builtins
import io
import os
import runpy
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
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
    resume: int | None = None


def check(target: str, *, is_module: bool, out: Path | None, recording: Recording) -> None:
    """Refuse what cannot be meant before anything runs.

    Raises:
        InputError: There is no such script, preset, measure, schedule, mirror or step, or a pattern is none.
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
    if recording.resume is not None and recording.resume < 1:
        raise InputError("--resume", expected="a step ≥ 1", got=str(recording.resume), do="name the checkpoint's step")
    if recording.resume is not None and out is None:
        raise InputError("--resume", expected="--out with the run to go on with", got="no --out", do="name it")


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
    sys.argv = ["-m" if is_module else target, *arguments]
    try:
        if is_module:
            _run_module(target)
        else:
            _run_script(target)
    except BaseException as error:
        session.end_after_threads(error)
        _hide_own_frames()
        raise
    session.end_after_threads(None)


def _run_script(path: str) -> None:
    """Run a script as the interpreter does: as the module `__main__`, which stays after it has run."""
    # Not tidied up: `./train.py` is shown as it is written.
    absolute = os.path.join(os.getcwd(), path)
    main = _begin_main(os.path.dirname(os.path.realpath(path)))
    main.__file__ = absolute
    main.__cached__ = None  # type: ignore[attr-defined]
    main.__loader__ = SourceFileLoader("__main__", absolute)
    with io.open_code(absolute) as file:
        # Not with the future statements of this file.
        code = compile(file.read(), absolute, "exec", dont_inherit=True)
    exec(code, main.__dict__)


def _run_module(name: str) -> None:
    """Run a module as `python -m` does, by the very function that does it there."""
    _begin_main(os.getcwd())
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]


def _begin_main(folder: str) -> types.ModuleType:
    """Put a new `__main__` in the place of the launcher's, and `folder` where imports look first."""
    if not sys.flags.safe_path:  # with which the launcher's own folder is not in its place either
        sys.path[0] = folder
    main = types.ModuleType("__main__")
    main.__builtins__ = builtins  # type: ignore[attr-defined]
    main.__annotations__ = {}
    sys.modules["__main__"] = main
    return main


def _hide_own_frames() -> None:
    """Let an exception that nobody catches be printed as without the launcher, by whatever hook the script has set."""
    shown_by = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        current: BaseException | None = error
        seen = set()
        while current is not None and id(current) not in seen:  # with those that led to it
            seen.add(id(current))
            current.__traceback__ = _without_own(current.__traceback__)
            current = current.__cause__ or current.__context__
        shown_by(kind, error, error.__traceback__)

    sys.excepthook = show


class _Session:
    """The trackers of one launched script."""

    def __init__(self, folder: Path, recording: Recording) -> None:
        self._folder = folder
        self._recording = recording
        self._process = os.getpid()
        self._discovery: Any = None
        self._fault: Exception | None = None
        self._announced: list[Tracker] = []  # of processes that train together, one speaks

    def start(self) -> None:
        """Begin to look for optimisers."""
        try:
            from linchain_analysis.tracking.discovery import Discovery

            self._discovery = Discovery(self._make_tracker)
        except Exception as error:  # the script imports torch, and goes on
            self._fault = error

    def end_after_threads(self, error: BaseException | None) -> None:
        """End, but where the script has left threads that the interpreter waits for, only after them."""
        waited_for = (thread for thread in threading.enumerate() if not thread.daemon)
        if any(thread is not threading.main_thread() for thread in waited_for):
            if self._discovery is not None:
                import linchain_analysis.tracking.lifetime  # noqa: F401  whose own turn at exit comes after this one

            atexit.register(self.end, error)
        else:
            self.end(error)

    def end(self, error: BaseException | None) -> None:
        """Close every tracker with how the script ended, and say where the runs are."""
        if os.getpid() != self._process:  # a worker that the script forked
            return
        if self._discovery is None:
            if self._fault is not None:
                _say(f"nothing was tracked, by a fault of its own ({type(self._fault).__name__}: {self._fault}).")
            elif error is None:
                _say("the script did not import torch; nothing was tracked.")
            return
        self._discovery.close()
        for tracker in self._discovery.trackers:
            tracker.end(error)  # says itself how many steps are where, and what they cost
            if not tracker.num_steps and tracker.fault is None and tracker in self._announced:
                _say(f"0 steps in {tracker.path}")
        if not self._discovery.trackers:
            _say(f"{self._discovery.describe_nothing()} The script itself ran as without tracking.")

    def _make_tracker(self, model: Any, optimizer: Any, number: int, known: Mapping[str, Any]) -> Tracker:
        from linchain_analysis.tracking.lifetime import writes_here
        from linchain_analysis.tracking.resumption import number_path
        from linchain_analysis.tracking.tracker import Tracker

        said = vars(self._recording)
        asked = {} if self._recording.resume is None else {"resume": self._recording.resume}  # goes before a Trainer's
        tracker = Tracker(model, optimizer, number_path(self._folder, number), **{**said, **known, **asked})
        if tracker.fault is None and writes_here():
            _say(f"tracking into {tracker.path}")
            self._announced.append(tracker)
        return tracker


def _without_own(trace: TracebackType | None) -> TracebackType | None:
    """Drop the frames up to the script's own, and those of the patches that stand between the script and torch."""
    entries = []
    while trace is not None:
        entries.append(trace)
        trace = trace.tb_next
    files = [entry.tb_frame.f_code.co_filename for entry in entries]
    first = max((number + 1 for number, file in enumerate(files) if file == __file__), default=0)
    patches = str(Path(__file__).with_name("interception.py"))
    own = [file == patches for file in files]
    for number in range(len(files) - 1):  # torch's frame through which a patch leaves compiled code
        own[number] = own[number] or (own[number + 1] and files[number].endswith("_dynamo/eval_frame.py"))
    kept = [entry for number, entry in enumerate(entries) if number >= first and not own[number]]
    following = None
    for entry in reversed(kept):
        entry.tb_next, following = following, entry
    return following


def _say(message: str) -> None:
    """Say something beside the script's own output; of several processes the first does."""
    if os.environ.get("RANK", "0") == "0":  # torchrun and accelerate set it
        print(f"linchain_analysis: {message}", file=sys.stderr)
