"""How a run ends, which process writes it, and what became of the training."""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import sys
import weakref
from pathlib import Path
from typing import Protocol

import torch

from linchain_analysis.errors import LinchainError, RunError, UnsupportedError
from linchain_analysis.tracking.ranks import PeerError
from linchain_analysis.tracking.signals import SignalGuard

logger = logging.getLogger("linchain_analysis")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Endable(Protocol):
    """What has to be closed before the process ends."""

    def close(self, status: str = "complete", message: str | None = None) -> None:
        """End the run."""

    def interrupt(self, signal_name: str, *, write_rows: bool) -> None:
        """Write down, at once and whatever is going on, that a signal ends the process."""


OPEN: weakref.WeakSet[Endable] = weakref.WeakSet()


def keep_open(tracker: Endable) -> None:
    """From now on the process does not end without `tracker` being told."""
    OPEN.add(tracker)
    _SIGNALS.install()


def let_go(tracker: Endable) -> None:
    """`tracker` is closed."""
    OPEN.discard(tracker)
    if not OPEN:
        _SIGNALS.remove()


def _interrupt_all(signal_name: str, write_rows: bool) -> None:
    for tracker in list(OPEN):
        with contextlib.suppress(Exception):  # the others are to be marked as well
            tracker.interrupt(signal_name, write_rows=write_rows)


_SIGNALS = SignalGuard(_interrupt_all)


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


def describe_fault(error: Exception, path: Path, num_steps: int) -> str:
    """Return the one message about a fault that ended tracking."""
    what = _describe(error, path)
    if isinstance(error, UnsupportedError):
        return f"{what}. Tracking of {path} ended at step {num_steps}; training goes on untracked."
    if isinstance(error, PeerError):
        return f"tracker: tracking of {path} ended at step {num_steps}: {error}. Training goes on untracked."
    if not isinstance(error, (OSError, RunError)):
        return (
            f"tracker: tracking of {path} ended at step {num_steps} by a fault of its own ({what}). Training goes on "
            "untracked; pass strict=True to see where it came from."
        )
    place = f"tracker, at step {num_steps}" if num_steps else "tracker"
    full = isinstance(error, OSError) and error.errno in _FULL
    do = "Free space on that disk" if full else "Name a folder that can be written, and leave it alone meanwhile"
    return f"{place}: expected a run folder that can be written, got {path} ({what}); training goes on untracked. {do}."


def _describe(error: Exception, path: Path) -> str:
    with contextlib.suppress(OSError):
        if path.is_symlink() and not path.exists():
            return f"a link to {path.readlink()}, which is not there"
        if path.exists() and not path.is_dir():
            return "a file"
    what = str(error) if isinstance(error, LinchainError) else f"{type(error).__name__}: {error}"
    return what.rstrip(".")


def forget_frames(error: BaseException) -> None:
    """Drop where `error`, which is kept, came from.

    Through its frames it would keep alive all that the functions around a training step hold: the model, the batch, and
    process groups that have to be gone before the interpreter is.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        current.__traceback__ = None
        current = current.__cause__ or current.__context__


def writes_here() -> bool:
    """Whether this process writes: of several that train together, the first does."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
