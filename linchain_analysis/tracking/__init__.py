"""From optimiser hooks to a run, in three ways: a raw loop, a Trainer, an unchanged script."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linchain_analysis.tracking.callback import TrackerCallback
    from linchain_analysis.tracking.tracker import Tracker

__all__ = ["Tracker", "TrackerCallback"]

_HOMES = {"Tracker": "tracker", "TrackerCallback": "callback"}


def __getattr__(name: str) -> Any:
    # On first use: the launcher lives here too, and starts scripts that may need neither torch nor transformers.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
