"""What the controls found, as a file: findings.json, by the name of the control."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linchain_analysis.controls.control import Control, Finding
from linchain_analysis.errors import InputError

FILE = "findings.json"


def describe_finding(control: Control, finding: Finding, seconds: float) -> dict[str, Any]:
    """Return what is said of one control, as a JSON object; NaN and Inf become null."""
    return {
        "title": control.title,
        "claim": control.claim,
        "source": control.source,
        "criterion": control.criterion,
        "history": control.history,
        "passed": finding.passed,
        "statement": finding.statement,
        "caption": finding.drawn.caption,
        "measured": {name: value if math.isfinite(value) else None for name, value in finding.measured.items()},
        "seconds": round(seconds, 1),
    }


def add_finding(folder: Path, name: str, found: Mapping[str, Any]) -> None:
    """Put what was found of `name` into the file of `folder`, beside what earlier calls found of other controls.

    The file is read, changed and replaced without a lock: of two calls at one time, one may lose what the other found.

    Raises:
        InputError: A file that is there and is none of these.
    """
    together = read_findings(folder) if (folder / FILE).exists() else {}
    together[name] = dict(found)
    text = json.dumps(dict(sorted(together.items())), indent=2, ensure_ascii=False, allow_nan=False)
    part = folder / f"{FILE}.part"
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, folder / FILE)


def read_findings(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what was found of each control by name.

    Raises:
        InputError: No such file, or one that is no object of objects.
    """
    path = folder / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            str(path),
            expected="what python -m linchain_analysis.calibrate writes",
            got=f"{type(error).__name__}: {error}",
            do="run it, or remove the file",
        ) from error
    if not (isinstance(found, dict) and all(isinstance(one, dict) for one in found.values())):
        raise InputError(
            str(path), expected="an object with one object for each control", got="another JSON", do="remove the file"
        )
    return found


def recorded_seconds(folders: Sequence[Path]) -> dict[str, float]:
    """Return how long each control took by name, as the files of `folders` say; of two that know it, the later one.

    Raises:
        InputError: A file that is there and is none of these.
    """
    found: dict[str, float] = {}
    for folder in folders:
        if (folder / FILE).exists():
            found |= {name: float(one["seconds"]) for name, one in read_findings(folder).items() if "seconds" in one}
    return found
