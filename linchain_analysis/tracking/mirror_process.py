"""The process of one mirror: takes scalars from the training process and hands them to TensorBoard, W&B or Trackio.

It is a process of its own because what these packages do to the one they are imported in is much (environment
variables, exit hooks, captured output, threads, a service that finishes at its leisure), and the training must not
notice. It ends with its input: also when the training process is killed, what had been handed over is kept.
"""

from __future__ import annotations

import inspect
import netrc
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

PROJECT = "linchain_analysis"
STEP = "linchain_step"
_FLUSH_SECONDS = 10
_LINGER_SECONDS = 600


@dataclass(frozen=True)
class Opening:
    """What a mirror is told first.

    Attributes:
        kind: `tensorboard`, `wandb` or `trackio`.
        folder: The run folder, absolute.
        names: Names of the values of each step.
        config: What the run says of itself.
        after: The step after which a training goes on from a checkpoint; 0 for a new one.
        beside: `project entity group mode` of the W&B run that the script itself has open; else empty.
    """

    kind: str
    folder: str
    names: tuple[str, ...]
    config: Mapping[str, Any]
    after: int = 0
    beside: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Row:
    """Scalars of one step.

    Attributes:
        step: Its number.
        said: Scalars by name.
        values: Those of `Opening.names`; None where they are not sent.
    """

    step: int
    said: Mapping[str, float]
    values: NDArray[np.float32] | None = None


class Backend(Protocol):
    """Where scalars go."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take scalars of a step; steps may come in any order."""

    def close(self) -> None:
        """The run ends."""


class TensorBoardFiles:
    """Event files in `tensorboard` of the run folder, of one event a step: thousands would take ten times as long."""

    def __init__(self, opening: Opening) -> None:
        events: Any = import_module("tensorboard.compat.proto.event_pb2")
        summaries: Any = import_module("tensorboard.compat.proto.summary_pb2")
        writers: Any = import_module("tensorboard.summary.writer.event_file_writer")
        self._event, self._summary = events.Event, summaries.Summary
        folder = Path(opening.folder) / "tensorboard"
        self._writer = writers.EventFileWriter(str(folder), flush_secs=_FLUSH_SECONDS)
        if opening.after:  # what an earlier process wrote of later steps is superseded
            start = events.SessionLog(status=events.SessionLog.START)
            self._writer.add_event(self._event(step=opening.after + 1, wall_time=time.time(), session_log=start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one event."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(step=step, wall_time=time.time(), summary=summary))

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandbRun:
    """A run of W&B of its own, beside the script's where it has one: that one's history stays what the script logs."""

    def __init__(self, opening: Opening) -> None:
        wandb: Any = import_module("wandb")
        beside = opening.beside or {}
        self._run = wandb.init(
            project=beside.get("project") or os.environ.get("WANDB_PROJECT") or PROJECT,
            entity=beside.get("entity"),
            group=beside.get("group"),
            name=Path(opening.folder).name,
            dir=opening.folder,
            config=dict(opening.config),
            mode=beside.get("mode") or os.environ.get("WANDB_MODE") or (None if _has_key(wandb) else "offline"),
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        # Not W&B's own step, which only grows: what a script logs of a step may arrive after the next one.
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log one row of history."""
        self._run.log({**scalars, STEP: step})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class TrackioRun:
    """A run in Trackio's local store."""

    def __init__(self, opening: Opening) -> None:
        trackio: Any = import_module("trackio")
        # Nothing but scalars: no hardware, no dashboard in a notebook.
        wanted = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        known = inspect.signature(trackio.init).parameters
        self._run = trackio.init(
            project=PROJECT,
            name=Path(opening.folder).name,
            config=dict(opening.config),
            **{name: value for name, value in wanted.items() if name in known},
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log one row."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


BACKENDS: Mapping[str, type[TensorBoardFiles] | type[WandbRun] | type[TrackioRun]] = {
    "tensorboard": TensorBoardFiles,
    "wandb": WandbRun,
    "trackio": TrackioRun,
}


def main() -> None:
    """Mirror what comes on standard input until it ends."""
    stream = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nobody can ask for a login there
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_outlive, args=(os.getppid(),), daemon=True).start()
    with stream:  # closed at a fault, so that the training process hears of it at once
        opening: Opening = pickle.load(stream)
        backend: Backend = BACKENDS[opening.kind](opening)
        for row in _rows(stream):
            backend.write(row.step, _scalars(opening.names, row))
    backend.close()


def _rows(stream: IO[bytes]) -> Iterator[Row]:
    """Yield rows until the input ends, perhaps in the middle of one."""
    while True:
        try:
            row = pickle.load(stream)
        except (EOFError, pickle.UnpicklingError):
            return
        yield row


def _scalars(names: tuple[str, ...], row: Row) -> dict[str, float]:
    """By name, without what is undefined: these packages draw a gap for it, or a mark, or complain."""
    scalars = {name: value for name, value in row.said.items() if value == value}
    if row.values is not None:
        known = np.flatnonzero(~np.isnan(row.values))
        scalars.update(zip([names[i] for i in known], row.values[known].tolist(), strict=True))
    return scalars


def _outlive(parent: int) -> None:
    """End a process that hangs, some time after the one that it serves."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(_LINGER_SECONDS)
    os._exit(1)


def _has_key(wandb: Any) -> bool:
    """Whether W&B could log in without asking anybody."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(wandb.setup().settings.base_url).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
