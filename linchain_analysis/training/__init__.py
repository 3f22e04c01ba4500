"""Fine-tune one method on one problem, and grids of methods × learning rates × seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linchain_analysis.training.execution import GridResult, plan_runs, run_grid
from linchain_analysis.training.grid import DEMO_METHODS, Grid, PlannedRun
from linchain_analysis.training.settings import FinetuneSettings

if TYPE_CHECKING:
    from linchain_analysis.training.trainer import finetune

__all__ = [
    "DEMO_METHODS",
    "FinetuneSettings",
    "Grid",
    "GridResult",
    "PlannedRun",
    "finetune",
    "plan_runs",
    "run_grid",
]


def __getattr__(name: str) -> Any:
    # The Trainer pays seconds of imports (torch, transformers, PEFT), which a process that only plans runs or watches
    # its workers should not.
    if name == "finetune":
        from linchain_analysis.training.trainer import finetune

        return finetune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
