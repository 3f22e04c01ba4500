"""How a run ends, which process writes it, and what became of the training."""

from __future__ import annotations

import atexit
import logging
import sys
import weakref
from typing import Protocol

import torch

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


def writes_here() -> bool:
    """Whether this process writes: of several that train together, the first does."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
