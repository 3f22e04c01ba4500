"""The run folder: what it holds, how it is written and how it is read. No torch in here."""

from linchain_analysis.runs.catalogue import RunSet, find_runs, load_runs
from linchain_analysis.runs.complete import write_run
from linchain_analysis.runs.manifest import Manifest, ModuleRecord, Segment
from linchain_analysis.runs.reader import Run, load_run
from linchain_analysis.runs.schema import SCHEMA_VERSION
from linchain_analysis.runs.snapshots import Snapshot, pack_chain, read_snapshots
from linchain_analysis.runs.start import read_start, save_start
from linchain_analysis.runs.writer import RunWriter, append_evals

__all__ = [
    "SCHEMA_VERSION",
    "Manifest",
    "ModuleRecord",
    "Run",
    "RunSet",
    "RunWriter",
    "Segment",
    "Snapshot",
    "append_evals",
    "find_runs",
    "load_run",
    "load_runs",
    "pack_chain",
    "read_snapshots",
    "read_start",
    "save_start",
    "write_run",
]
