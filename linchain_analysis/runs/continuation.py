"""What a run says of itself when its training goes on from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from linchain_analysis.errors import InputError, RunError
from linchain_analysis.runs.manifest import Manifest, Segment
from linchain_analysis.runs.parts import Part, parts_of, read_part
from linchain_analysis.runs.schema import SCHEMA_VERSION, TABLES, next_number

_FIRST_TO_RESUME = 3  # older schema versions say nothing of parts


def continue_manifest(folder: Path, old: Manifest, new: Manifest, after: int) -> Manifest:
    """Return the manifest of a run that goes on after one of its steps; nothing is written.

    What was trained remains what the run's beginning says, how it is trained and recorded becomes what `new` says.

    Args:
        folder: The run folder.
        old: What it says of itself so far.
        new: What the part that follows says of itself.
        after: The step after which it follows, 0 for the very beginning.

    Raises:
        InputError: `after` is no step.
        RunError: The run has no such step, or it is of another training or an older schema.
        DamageError: What it holds is damaged.
    """
    if isinstance(after, bool) or not isinstance(after, int) or after < 0:
        raise InputError("after", expected="a step, or 0", got=repr(after), do="pass the step of the checkpoint")
    _check_schema(folder, old)
    _check_modules(folder, old, new)
    _check_columns(folder, old, new)
    segments = _to_segments(folder, old, after)
    last_step = max(last for _, last in segments)
    if after > last_step:
        raise RunError(
            str(folder),
            expected=f"a step that the run has, up to {last_step}",
            got=f"step {after}",
            do="go on with the run of that training, or start a new one",
        )
    return replace(
        new,
        method=old.method,
        problem=old.problem,
        base_learning_rate=old.base_learning_rate,
        init_seed=old.init_seed,
        data_seed=old.data_seed,
        modules=old.modules,
        extra={**old.extra, **new.extra},
        started=old.started,
        resumed=new.started,
        ended=None,
        status="running",
        message=None,
        tables={},
        schema_version=SCHEMA_VERSION,
        segments=tuple(segment for segment, _ in segments),
        number=next_number(folder),
    )


def _check_schema(folder: Path, old: Manifest) -> None:
    if old.schema_version < _FIRST_TO_RESUME:
        raise RunError(
            str(folder),
            expected=f"a run of schema version {_FIRST_TO_RESUME} or later to go on with",
            got=f"version {old.schema_version}",
            do="start a new run in another folder",
        )


def _check_modules(folder: Path, old: Manifest, new: Manifest) -> None:
    former, now = ({m.module: m.factors for m in manifest.modules} for manifest in (old, new))
    if list(former.items()) == list(now.items()):
        return
    changed = [name for name in {**former, **now} if former.get(name) != now.get(name)]
    raise RunError(
        str(folder),
        expected=f"the {len(former)} modules of the run, with the same factors in the same order",
        got=f"{len(now)} modules" + (f", other {', '.join(changed[:3])}" if changed else " in another order"),
        do="start a new run in another folder",
    )


def _check_columns(folder: Path, old: Manifest, new: Manifest) -> None:
    """A column that changed its kind would be two columns of one name."""
    known: dict[tuple[str, str], str] = {}
    for columns in (*(part.columns for part in parts_of(old)), new.columns):
        for table, added in columns.items():
            for name, kind in added:
                if known.setdefault((table, name), kind) != kind:
                    raise RunError(
                        str(folder),
                        expected=f"{table}.{name} to be {known[table, name]}, as in the run so far",
                        got=kind,
                        do="rename the column of the measure, or start a new run",
                    )


def _to_segments(folder: Path, old: Manifest, after: int) -> list[tuple[Segment, int]]:
    """Return the parts so far as earlier parts of a run that goes on after step `after`, each with its last step."""
    found = []
    for part, segment in zip(parts_of(old), (*old.segments, None), strict=True):
        limit = after if part.last_step is None else min(part.last_step, after)  # a part stays cut where it was
        tables = part.tables or _describe_streams(folder, part)
        steps = read_part(folder, replace(part, tables=tables), "steps", ["step"])[0]["step"]
        num_steps = pa.compute.sum(pa.compute.less_equal(steps, limit)).as_py() or 0
        known = segment or _to_segment(old, part)
        now = replace(known, tables=tables, last_step=limit, num_steps=num_steps)
        found.append((now, pa.compute.max(steps).as_py() or 0))
    return found


def _describe_streams(folder: Path, part: Part) -> dict[str, dict[str, Any]]:
    """Read the streams of a part that was killed, or could not be completed, and tell how many rows are in each."""
    found = {}
    for table in TABLES:
        rows, _ = read_part(folder, part, table)
        found[table] = {"file": part.file(table), "num_rows": rows.num_rows}
    return found


def _to_segment(manifest: Manifest, part: Part) -> Segment:
    return Segment(
        number=part.number,
        last_step=0,
        num_steps=0,
        tables=part.tables,
        columns=manifest.columns,
        preset=manifest.preset,
        every=manifest.every,
        measures=manifest.measures,
        command=manifest.command,
        packages=manifest.packages,
        hardware=manifest.hardware,
        extra=manifest.extra,
        started=manifest.resumed or manifest.started,
        ended=manifest.ended,
        status=manifest.status,
        message=manifest.message,
        process=manifest.process,
    )
