"""See what happens inside a LoRA-like fine-tune.

Importing this package imports neither torch nor PEFT: public names load on first use, and the LinChain method makes
itself known to PEFT when PEFT is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from linchain_analysis.adapters import LinChainConfig, LinChainModel, fold_to_lora, method_config
    from linchain_analysis.runs import load_run, load_runs
    from linchain_analysis.tracking.callback import TrackerCallback
    from linchain_analysis.tracking.tracker import Tracker

__version__ = "0.1.0"

_HOMES = {
    "LinChainConfig": "linchain_analysis.adapters",
    "LinChainModel": "linchain_analysis.adapters",
    "fold_to_lora": "linchain_analysis.adapters",
    "method_config": "linchain_analysis.adapters",
    "load_run": "linchain_analysis.runs",
    "load_runs": "linchain_analysis.runs",
    "Tracker": "linchain_analysis.tracking.tracker",
    "TrackerCallback": "linchain_analysis.tracking.callback",
}

__all__ = [
    "LinChainConfig",
    "LinChainModel",
    "Tracker",
    "TrackerCallback",
    "__version__",
    "fold_to_lora",
    "load_run",
    "load_runs",
    "method_config",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


@wrapt.when_imported("peft")  # type: ignore[untyped-decorator, unused-ignore]
def _register_method(_: Any) -> None:
    # Only the import: the last line of that package registers, so that any order of imports ends registered.
    importlib.import_module("linchain_analysis.adapters")
