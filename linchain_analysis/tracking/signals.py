"""Signals that end a process: the runs are marked, and the process ends as it would have without.

Python runs a signal handler in the main thread, between two of its bytecodes. A main thread that sits in a long call
(a collective whose peer is dead, a large product, a lock) would keep the process alive until that returns; under
torchrun it would sit there until SIGKILL comes after 30 seconds. So a thread listens besides: the interpreter writes
each signal's number to a "wakeup" descriptor at once, from wherever the main thread is, and if that does not get to the
handler in a moment, the listener marks the runs and ends the process itself. What neither can help is a call that never
lets go of the interpreter's lock, as no tensor operation does.

The descriptor is a socket and not a pipe, for its messages say which process sent them: a forked child shares the
descriptor until it has run its first lines, and a signal that ends it then must not end its parent. Where a system
does not tell the sender (macOS), or another owner such as asyncio has set a descriptor, there is the handler alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_UNTIL_HANDLED = 0.2  # seconds that the main thread has to come to its next bytecode
_UNTIL_MARKED = 3.0  # seconds that writing the mark may take, on a disk that hangs
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_PACKAGE = Path(__file__).parents[1]
# Frames of these stand below the training's own, or around it.
_AROUND = {str(_PACKAGE / "tracking" / name) for name in ("launcher.py", "interception.py", "signals.py")}
_INSIDE = tuple(str(_PACKAGE / room) + os.sep for room in ("tracking", "runs", "probes", "measures"))


class SignalGuard:
    """Handles SIGTERM and SIGHUP where nobody else does.

    Args:
        mark: Writes down that the process is ended by the signal of this name; with True where rows may be written
            as well: the call comes from the main thread, which is in nothing of the tracker's.
    """

    def __init__(self, mark: Callable[[str, bool], None]) -> None:
        self._mark = mark
        self._handler = self._handle  # one object, to be recognised
        self._process = 0
        self._listening: tuple[socket.socket, socket.socket] | None = None
        self._handling = threading.Event()
        self._ending = False
        self._hooked = False
        self._mask = threading.local()  # of the thread that forks

    def install(self) -> None:
        """Handle the signals that nobody handles or ignores; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._process = os.getpid()
        with contextlib.suppress(ValueError):  # the main thread of a subinterpreter
            for number in _SIGNALS:
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, self._handler)
        if not any(signal.getsignal(number) is self._handler for number in _SIGNALS):
            return
        if not self._hooked:
            os.register_at_fork(before=self._hold_back, after_in_parent=self._let_through, after_in_child=self._forget)
            self._hooked = True
        if self._listening is None and hasattr(socket, "SO_PASSCRED"):
            with contextlib.suppress(OSError, RuntimeError):  # no descriptor or no thread is to be had
                self._listen()

    def remove(self) -> None:
        """Give the signals back, unless somebody else has taken them since; outside the main thread nobody can."""
        if threading.current_thread() is not threading.main_thread():
            return
        with contextlib.suppress(ValueError):
            for number in _SIGNALS:
                if signal.getsignal(number) is self._handler:
                    signal.signal(number, signal.SIG_DFL)
            self._stop_listening()

    # --- in the main thread ------------------------------------------------------------------------------------

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._handling.set()
        if self._ending:  # a second signal while the first is seen to
            return
        self._ending = True
        with contextlib.suppress(Exception):
            self._mark(signal.Signals(number).name, not _is_inside(frame))
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    # --- around a fork -----------------------------------------------------------------------------------------

    def _hold_back(self) -> None:
        """Keep signals waiting: the interpreter of a child forgets those that came to a handler before its first line.

        A child would survive a signal that ends it without this handler.
        """
        self._mask.held = None
        if any(signal.getsignal(number) is self._handler for number in _SIGNALS):
            self._mask.held = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def _let_through(self) -> None:
        held = getattr(self._mask, "held", None)
        if held is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def _forget(self) -> None:
        """In a forked child: its end is not the end of the parent's run."""
        if self._process and self._process != os.getpid():
            with contextlib.suppress(Exception):
                self.remove()
        self._let_through()

    # --- in the listener's thread ------------------------------------------------------------------------------

    def _listen(self) -> None:
        ours, written_to = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        written_to.setblocking(False)
        before = signal.set_wakeup_fd(written_to.fileno(), warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
            ours.close()
            written_to.close()
            return
        self._listening = ours, written_to
        try:
            threading.Thread(target=self._hear, args=(ours,), name="linchain-signals", daemon=True).start()
        except RuntimeError:
            self._stop_listening()
            ours.close()

    def _stop_listening(self) -> None:
        if self._listening is None:
            return
        (ours, written_to), self._listening = self._listening, None
        current = signal.set_wakeup_fd(-1)
        if current not in (-1, written_to.fileno()):
            signal.set_wakeup_fd(current)
        if self._process == os.getpid():
            with contextlib.suppress(OSError):
                written_to.send(b"\0")  # lets the thread end
        else:
            ours.close()
        written_to.close()

    def _hear(self, ours: socket.socket) -> None:
        with ours:
            while True:
                data, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(_CREDENTIALS.size))
                if _sender(ancillary) != self._process:
                    continue
                if data == b"\0":
                    return
                if data[0] in _SIGNALS and signal.getsignal(data[0]) is self._handler:
                    self._end(data[0])

    def _end(self, number: int) -> None:
        """End the process if the main thread does not."""
        if self._handling.wait(_UNTIL_HANDLED):
            time.sleep(_UNTIL_MARKED)
        elif not self._ending:
            self._ending = True
            name = signal.Signals(number).name
            marking = threading.Thread(target=self._mark_quietly, args=(name,), daemon=True)
            marking.start()
            marking.join(_UNTIL_MARKED)
        # `signal.signal` is for the main thread alone.
        reset = ctypes.CDLL(None).signal
        reset.argtypes, reset.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        reset(number, None)
        os.kill(os.getpid(), number)

    def _mark_quietly(self, name: str) -> None:
        with contextlib.suppress(Exception):
            self._mark(name, False)


def _sender(ancillary: list[Any]) -> int:
    """The process that sent a message, 0 where that was not told."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and len(data) == _CREDENTIALS.size:
            return int(_CREDENTIALS.unpack(data)[0])
    return 0


def _is_inside(frame: FrameType | None) -> bool:
    """Whether the tracker is at work in `frame` or below it."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_INSIDE) and name not in _AROUND:
            return True
        frame = frame.f_back
    return False
