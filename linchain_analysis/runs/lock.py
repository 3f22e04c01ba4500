"""One writer at a time: a lock of the operating system on a file of its own in the run folder.

The kernel lets go of it when the process dies, however that happens. The file says nothing but who holds it, and stays.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import weakref
from pathlib import Path
from types import TracebackType

from linchain_analysis.errors import RunError

LOCK = ".lock"
_HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
# Some network file systems have no locks: there a run is written without, as if nobody else could.
_UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}
# Whoever asks `is_locked` holds the lock for some microseconds.
_PATIENCE_SECONDS = 0.2

_OPEN: weakref.WeakSet[RunLock] = weakref.WeakSet()
_hooked = False


class RunLock:
    """Holds the lock of a run folder until it is released or forgotten.

    Args:
        folder: The run folder.
        patience_seconds: How long to wait for somebody who holds it.

    Raises:
        RunError: Somebody else holds it, in this process or another one.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, *, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        self._fd = _acquire(folder, time.monotonic() + patience_seconds)
        self._finalizer = weakref.finalize(self, _release, self._fd, os.getpid())
        _forget_in_children(self)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let others write. A second call does nothing."""
        self._finalizer()

    def _leave(self) -> None:
        """In a forked child: close its copy, so that the lock lives as long as the parent and no longer."""
        if self._finalizer.detach() is not None and self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)


def is_locked(folder: Path) -> bool | None:
    """Whether somebody holds the lock of a run folder; None where that cannot be known."""
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in _HELD else None
    finally:
        os.close(fd)
    return False


def _acquire(folder: Path, deadline: float) -> int | None:
    """Return the descriptor that holds the lock; None where the file system has no locks."""
    path = folder / LOCK
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.stat()):  # else the folder was deleted and made anew meanwhile
                _write_owner(fd)
                return fd
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                os.close(fd)
                return None
            if error.errno not in _HELD:
                os.close(fd)
                raise
            if time.monotonic() > deadline:
                owner = os.read(fd, 20).decode(errors="replace").strip()
                os.close(fd)
                raise _held(folder, owner) from None
            time.sleep(0.01)
        os.close(fd)


def _write_owner(fd: int) -> None:
    with contextlib.suppress(OSError):  # it is only told to others, and a full disk is no reason to refuse
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)


def _release(fd: int | None, pid: int) -> None:
    if fd is not None and pid == os.getpid():
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)  # nobody holds it: of a run that has ended no trace of a process stays in it
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # in so many words: a copy of a child would keep it
        with contextlib.suppress(OSError):
            os.close(fd)


def _held(folder: Path, owner: str) -> RunError:
    who = "another writer of this process" if owner == str(os.getpid()) else "another process"
    files = sorted(path.name for path in folder.glob("manifest.json"))
    return RunError(
        str(folder),
        expected="a folder that nobody else writes",
        got=", ".join([*files, f"and it is being written by {who} (pid {owner or 'unknown'})"]),
        do="wait for its end, or choose another folder",
    )


def _forget_in_children(lock: RunLock) -> None:
    global _hooked
    _OPEN.add(lock)
    if not _hooked:  # with the first lock: importing this has no effect
        _hooked = True
        os.register_at_fork(after_in_child=_leave_all)


def _leave_all() -> None:
    for lock in list(_OPEN):
        lock._leave()
    _OPEN.clear()
