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
from typing import Any

PACKAGES = ("linchain-analysis", "matplotlib", "numpy", "pandas", "pyarrow", "scipy")


def describe_origin(command: Sequence[str], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what every result of one call shares, as a JSON object.

    The date is that of SOURCE_DATE_EPOCH where it is set, so that a build can be repeated byte for byte.

    Args:
        command: The command line, one argument each.
        runs: What `describe_run` said of each run.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    return {
        "command": list(command),
        "date": now.isoformat(timespec="seconds"),
        "git": describe_commit(Path.cwd()),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "runs": list(runs),
    }


def describe_run(folder: Path, key_fields: dict[str, Any]) -> dict[str, Any]:
    """Return a run's place relative to the working directory, its `key_fields` and the checksum of its files."""
    return {"path": tell_path(folder), **key_fields, "sha256": checksum(folder)}


def checksum(folder: Path) -> str:
    """Return the SHA-256 over names and contents of the files that lie in `folder` itself, in order of name."""
    total = hashlib.sha256()
    for path in sorted(file for file in folder.iterdir() if file.is_file()):
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
