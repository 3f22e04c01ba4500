"""What an audit found, as files and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from linchain_analysis.auditing.columns import MEANINGS
from linchain_analysis.auditing.curvature import Sharpness
from linchain_analysis.auditing.saved import SavedAdapter
from linchain_analysis.auditing.truncation import FunctionalRank
from linchain_analysis.errors import InputError
from linchain_analysis.vocabulary import define_column


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        adapters: What was looked at.
        modules: The table of `tabulate_modules`.
        kinds: The table of `summarise_kinds`.
        overlaps: The table of `compare_adapters`; empty for one adapter.
        functional_ranks: By adapter.
        sharpness: By adapter.
        notes: What could not be measured, and why.
    """

    adapters: Sequence[SavedAdapter]
    modules: pd.DataFrame
    kinds: pd.DataFrame
    overlaps: pd.DataFrame
    functional_ranks: Mapping[str, FunctionalRank] = field(default_factory=dict)
    sharpness: Mapping[str, Sharpness] = field(default_factory=dict)
    notes: Sequence[str] = ()


def describe_adapter(adapter: SavedAdapter) -> dict[str, Any]:
    """Return what an adapter is, whether or not its delta can be measured."""
    config = adapter.config
    sizes = [math.prod(shape) for shape in adapter.tensors.values()]
    return {
        "adapter": adapter.name,
        "path": str(adapter.path),
        "type": adapter.type,
        "method": adapter.method,
        "base_model": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "modules": len(adapter.chains),
        "parameters": sum(sizes),
        "tensors": len(sizes),
        "refused": adapter.refused,
        "others": list(adapter.others),
    }


def refuse_adapter_folder(out: Path, adapters: Sequence[SavedAdapter]) -> None:
    """Refuse to write into the folder of an adapter.

    Raises:
        InputError: `out` is one.
    """
    if any(out.resolve() == adapter.path.resolve() for adapter in adapters):
        raise InputError("--out", expected="a folder of its own", got=f"the adapter's own, {out}", do="choose another")


def save_audit(audit: Audit, out: Path) -> list[Path]:
    """Write `audit.parquet` (modules), `overlaps.parquet` where several adapters were compared, and `audit.json`."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, table in (("audit", audit.modules), ("overlaps", audit.overlaps)):
        if len(table):
            written.append(save_table(table, out / f"{name}.parquet"))
    path = out / "audit.json"
    path.write_text(json.dumps(to_json(audit), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*written, path]


def save_table(table: pd.DataFrame, path: Path, column_table: str = "modules") -> Path:
    """Write a table with the meaning of each column beside it."""
    stored = pa.Table.from_pandas(table, preserve_index=False)
    fields = []
    for column in stored.schema:
        known = define_column(column_table, column.name)
        meaning = MEANINGS.get(column.name) or (known.meaning if known else "")
        fields.append(column.with_metadata({"meaning": meaning}) if meaning else column)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(stored.cast(pa.schema(fields, metadata=stored.schema.metadata)), path)
    return path


def to_json(audit: Audit) -> dict[str, Any]:
    """Return everything as JSON has it: NaN and Inf, which it lacks, as null and text."""
    found = {
        "adapters": [describe_adapter(adapter) for adapter in audit.adapters],
        "modules": records(audit.modules),
        "kinds": records(audit.kinds),
        "overlaps": records(audit.overlaps),
        "functional_ranks": {
            name: {**asdict(rank), "gain": rank.gain} for name, rank in audit.functional_ranks.items()
        },
        "sharpness": {name: asdict(sharpness) for name, sharpness in audit.sharpness.items()},
        "notes": list(audit.notes),
    }
    plain: dict[str, Any] = plain_json(found)
    return plain


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def plain_json(value: Any) -> Any:
    """Return a value in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain_json(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        number = float(value)
        if math.isnan(number):
            return None
        return number if math.isfinite(number) else str(number)
    if value is None or value is pd.NA:
        return None
    return str(value) if not isinstance(value, str) else value
