"""What a grid says about itself while it runs, for displays to show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunStarted:
    """A worker has begun a run, or several at once under one name."""

    worker: int
    name: str
    num_runs: int = 1


@dataclass(frozen=True)
class RunStepped:
    """A run has made a step. `loss` is the latest that is known, None before the first."""

    worker: int
    name: str
    step: int
    num_steps: int
    loss: float | None


@dataclass(frozen=True)
class RunFinished:
    """A run is complete, after so many seconds, or several that were begun at once."""

    worker: int
    name: str
    seconds: float
    num_runs: int = 1


@dataclass(frozen=True)
class RunFailed:
    """A run ended by an error, in one line; `log` names the file with the whole of it."""

    worker: int
    name: str
    error: str
    log: str


Event = RunStarted | RunStepped | RunFinished | RunFailed
