"""Which process writes a run, and whether it still lives."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def describe_process() -> dict[str, Any]:
    """Return what the manifest keeps of this process.

    `started` is in the kernel's ticks since boot, where it says them: numbers of processes are used again, but not with
    the same time.
    """
    return {"pid": os.getpid(), "host": platform.node(), "started": _start_of(os.getpid())}


def is_here(process: Mapping[str, Any]) -> bool:
    """Whether a process that was described so ran on this machine."""
    return bool(process.get("host") == platform.node())


def is_running(process: Mapping[str, Any]) -> bool:
    """Whether a process of this machine that was described so is still there."""
    pid, started = int(process["pid"]), process.get("started")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # there, but somebody else's
        pass
    return started is None or _start_of(pid) == started


def _start_of(pid: int) -> int | None:
    """When a process started; None where the kernel does not say, or it is dead and only waits to be noticed."""
    try:
        # The name, in parentheses, may hold anything; what follows are the state, and the start 19 fields after it.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
