"""Tidy tables from runs, with the statistics that figures and reports show."""

from __future__ import annotations

from linchain_analysis.analysis.comparisons import Comparison, require_one_condition, split_comparisons
from linchain_analysis.analysis.ranks import measure_ranks
from linchain_analysis.analysis.summary import summarise_methods
from linchain_analysis.analysis.trajectories import trajectories
from linchain_analysis.runs import RunSet

__all__ = [
    "Comparison",
    "RunSet",
    "measure_ranks",
    "require_one_condition",
    "split_comparisons",
    "summarise_methods",
    "trajectories",
]
