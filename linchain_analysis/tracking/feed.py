"""Feed another process without ever waiting for it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linchain_analysis.errors import RunError

_MOST_BYTES = 64_000_000
_POLL_SECONDS = 0.005
_CODE = "import sys; sys.path[:] = {path!r}; from {module} import main; main()"


class Feed:
    """Messages to the function `main` of a module that runs in a process of its own, pickled to its standard input.

    What its input does not take at once waits in memory, up to 64 MB, and goes along with the next message: there is
    no thread here, and the caller never waits. Beyond that messages are left out.

    Args:
        name: What errors call it.
        module: Holds `main`.
        log: Where its output and errors go; removed where there are none.
        environment: Its environment variables.
    """

    def __init__(self, name: str, module: str, log: Path, environment: Mapping[str, str]) -> None:
        self.num_left_out = 0
        self._name = name
        self._log = log
        self._waiting: deque[memoryview] = deque()
        self._num_bytes = 0
        path = [os.path.abspath(entry) for entry in sys.path]  # which a script may have changed
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE.format(path=path, module=module)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,  # an interrupt at the keyboard is for the training
            )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        os.set_blocking(self._pipe.fileno(), False)

    def send(self, message: Any) -> None:
        """Hand a message over, or keep it until the next one.

        Raises:
            RunError: The process has ended.
        """
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        if self._waiting and self._num_bytes + len(data) > _MOST_BYTES:
            self.num_left_out += 1
        else:
            self._waiting.append(memoryview(data))
            self._num_bytes += len(data)
        self._push()

    def close(self, seconds: float) -> None:
        """End the input and wait for the process, at most so long; where it takes longer it goes on by itself.

        Raises:
            RunError: The process failed, or is not done yet.
        """
        deadline = time.monotonic() + seconds
        try:
            self._push()
            while self._waiting and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
                self._push()
            self._pipe.close()
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise RunError(
                self._name,
                expected=f"its process to be done within {seconds:g} s",
                got=f"process {self._process.pid} at work, which goes on by itself",
                do=f"see {self._log}",
            ) from None
        finally:
            self._pipe.close()
        if code != 0:
            raise self._ended()
        if not self._log.stat().st_size:
            self._log.unlink()

    def _push(self) -> None:
        """Write as much as the pipe takes."""
        while self._waiting:
            part = self._waiting[0]
            try:
                written = os.write(self._pipe.fileno(), part)
            except BlockingIOError:
                return
            except BrokenPipeError:
                raise self._ended() from None
            self._num_bytes -= written
            if written < len(part):
                self._waiting[0] = part[written:]
            else:
                self._waiting.popleft()

    def _ended(self) -> RunError:
        try:
            got = f"exit code {self._process.wait(2)}"
        except subprocess.TimeoutExpired:
            got = "a process that listens no more"
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            got = f"{got} ({lines[-1].strip()[:300]})"
        return RunError(self._name, expected="its process to take scalars", got=got, do=f"see {self._log}")
