"""Mirror the scalars of a run to a tracker of experiments. No torch until one is opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linchain_analysis.errors import InputError

MIRRORS = ("tensorboard", "wandb", "trackio")


def check_mirrors(report_to: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names in `report_to`.

    Raises:
        InputError: A name that is none of `MIRRORS`.
    """
    names = (report_to,) if isinstance(report_to, str) else tuple(report_to)
    for name in names:
        if name not in MIRRORS:
            raise InputError("report_to", expected=f"one of {', '.join(MIRRORS)}", got=repr(name), do="check the name")
    return names


def open_mirrors(names: Sequence[str], chains: Sequence[Any], manifest: Any, path: Path) -> list[Any]:
    """Open the mirrors of these names."""
    return []
