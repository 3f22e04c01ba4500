"""Look into what training left behind: finished PEFT adapters, and runs with snapshots."""

from linchain_analysis.auditing.examination import Request, examine
from linchain_analysis.auditing.folders import find_free, is_run, name_folder, read_adapters
from linchain_analysis.auditing.replay import apply_measures, describe_run
from linchain_analysis.auditing.report import Audit, save_audit
from linchain_analysis.auditing.saved import SavedAdapter, read_adapter

__all__ = [
    "Audit",
    "Request",
    "SavedAdapter",
    "apply_measures",
    "describe_run",
    "examine",
    "find_free",
    "is_run",
    "name_folder",
    "read_adapter",
    "read_adapters",
    "save_audit",
]
