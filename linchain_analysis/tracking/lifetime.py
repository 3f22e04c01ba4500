"""How a run begins and ends: its folder, which process writes it, and what became of the training."""

from __future__ import annotations

import atexit
import logging
import sys
import weakref
from pathlib import Path
from typing import Protocol

import torch

from linchain_analysis.runs import Manifest, RunWriter

logger = logging.getLogger("linchain_analysis")


class Endable(Protocol):
    """What has to be closed before the process ends."""

    def close(self, status: str = "complete", message: str | None = None) -> None:
        """End the run."""


OPEN: weakref.WeakSet[Endable] = weakref.WeakSet()


@atexit.register
def _close_open_trackers() -> None:
    """A process that ends without closing its trackers loses nothing; how it ended is written down."""
    for tracker in list(OPEN):
        tracker.close(*describe_ending(getattr(sys, "last_value", None), unfinished=True))


def describe_ending(error: BaseException | None, *, unfinished: bool = False) -> tuple[str, str | None]:
    """Return status and message of a run that ended with `error`."""
    if isinstance(error, SystemExit) and not error.code:
        error = None
    if error is None:
        return ("interrupted", "the process ended before the tracker was closed") if unfinished else ("complete", None)
    status = "interrupted" if isinstance(error, (KeyboardInterrupt, GeneratorExit)) else "failed"
    return status, f"{type(error).__name__}: {error}".removesuffix(": ")


def open_writer(path: Path, manifest: Manifest) -> tuple[RunWriter, Path]:
    """Open `path`, or the next free name beside it where it holds a run: neither run is lost."""
    number = 1
    while ((free := number_path(path, number)) / "manifest.json").exists():
        number += 1
    if free != path:
        logger.warning("tracker: %s holds a run already; this one is written to %s.", path, free)
    return RunWriter(free, manifest), free


def number_path(path: Path, number: int) -> Path:
    """Return `path` for the first of several runs, `path-2` for the second, and so on."""
    return path if number == 1 else path.with_name(f"{path.name}-{number}")


def writes_here() -> bool:
    """Whether this process writes: of several that train together, the first does."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
