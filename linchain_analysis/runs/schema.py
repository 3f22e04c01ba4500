"""How the tables of a run are stored while it is written and when it is complete."""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 1

_SPECTRUM = pa.list_(pa.float32())
# Modules and factors are numbers in a live stream, and names in Parquet, which then says by itself what it is about.
_NUMBER = pa.int32()

LIVE: dict[str, pa.Schema] = {
    "steps": pa.schema(
        [
            ("step", pa.int64()),
            ("epoch", pa.float64()),
            ("loss", pa.float64()),
            ("learning_rate", pa.float64()),
            ("grad_norm", pa.float64()),
            ("clip_coef", pa.float64()),
            ("skipped", pa.bool_()),
            ("tokens", pa.int64()),
            ("seconds", pa.float64()),
            ("track_seconds", pa.float64()),
        ]
    ),
    "modules": pa.schema(
        [
            ("step", pa.int32()),
            ("module", _NUMBER),
            ("spectrum", _SPECTRUM),
            ("delta_update_spectrum", _SPECTRUM),
            ("descent_cosine", pa.float32()),
            # For presets that take no spectra; null where a spectrum says more.
            ("delta_norm", pa.float32()),
            ("delta_update_norm", pa.float32()),
        ]
    ),
    "factors": pa.schema(
        [
            ("step", pa.int32()),
            ("module", _NUMBER),
            ("factor", _NUMBER),
            ("grad_norm", pa.float32()),
            ("grad_cosine_previous", pa.float32()),
            ("update_norm", pa.float32()),
            ("weight_norm", pa.float32()),
            ("update_ratio", pa.float32()),
        ]
    ),
    "links": pa.schema(
        [("step", pa.int32()), ("module", _NUMBER), ("link", pa.string()), ("balance_drift", pa.float32())]
    ),
    "evals": pa.schema(
        [("step", pa.int64()), ("split", pa.string()), ("metric", pa.string()), ("value", pa.float64())]
    ),
    "scalars": pa.schema([("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())]),
}
TABLES = tuple(LIVE)
# A row of these counts only if the table `steps`, written last in each step, has its step.
BY_STEP = ("modules", "factors", "links")


def stream_name(table: str) -> str:
    """Return the file name of a table while the run is written."""
    return f"{table}.arrows"


def parquet_name(table: str) -> str:
    """Return the file name of a table of a complete run."""
    return f"{table}.parquet"
