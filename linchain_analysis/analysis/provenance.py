"""Where a result came from: command, versions, commit, and the runs it was computed from with their checksums."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linchain_analysis.runs import Run

_SAID = (
    "method",
    "problem",
    "base_learning_rate",
    "init_seed",
    "data_seed",
    "preset",
    "every",
    "status",
    "started",
    "schema_version",
)
_PACKAGES = ("linchain-analysis", "matplotlib", "numpy", "pandas", "pyarrow", "scipy")


def describe_origin(command: Sequence[str], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what every result of one call shares, as a JSON object.

    The date is that of SOURCE_DATE_EPOCH where it is set, so that a build can be repeated byte for byte.

    Args:
        command: The command line, one argument each.
        runs: What `describe_runs` said.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    return {
        "command": list(command),
        "date": now.isoformat(timespec="seconds"),
        "git": describe_commit(Path.cwd()),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "runs": list(runs),
    }


def describe_runs(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Return each run's place relative to the working directory, what its manifest says, and its files' checksum."""
    return [
        {
            "path": tell_path(run.path),
            **{name: getattr(run.manifest, name) for name in _SAID},
            "packages": dict(run.manifest.packages),
            "sha256": checksum(run.path),
        }
        for run in runs
    ]


def checksum(folder: Path) -> str:
    """Return the SHA-256 over names and contents of the files that lie in `folder` itself, in order of name.

    Hidden ones are left out: the lock of a run says who writes it and nothing of what was measured.
    """
    total = hashlib.sha256()
    for path in sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")):
        with open(path, "rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def tell_path(path: Path) -> str:
    """Return `path` relative to the working directory, with `/`, so that nothing of the machine is in it."""
    return Path(os.path.relpath(path)).as_posix()


def describe_commit(folder: Path) -> dict[str, Any] | None:
    """Return the commit of `folder`'s repository and whether tracked files differ from it; None without one."""
    commit = _git(folder, ["rev-parse", "HEAD"])
    if commit is None:
        return None
    return {"commit": commit, "changed": bool(_git(folder, ["status", "--porcelain", "--untracked-files=no"]))}


def _git(folder: Path, arguments: Iterable[str]) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
