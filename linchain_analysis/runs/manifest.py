"""What a run says of itself, in `manifest.json`."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from linchain_analysis.errors import DamageError, RunError
from linchain_analysis.runs.schema import SCHEMA_VERSION

MANIFEST = "manifest.json"
_PACKAGES = ("linchain-analysis", "torch", "transformers", "peft", "accelerate", "numpy", "pyarrow")


@dataclass(frozen=True)
class ModuleRecord:
    """One adapted layer of a run.

    Attributes:
        module: Name in the base model, `name@adapter` where the layer trains several.
        kind: Last part of the name.
        layer: Index of its block, None without one.
        adapter: Name of the adapter.
        d_in: Input size.
        d_out: Output size.
        scale: What multiplies the product of the factors, at the start.
        factors: Name and shape in chain view of each factor.
        refused: Why delta is not measured here, None where it is.
    """

    module: str
    kind: str
    layer: int | None
    adapter: str
    d_in: int
    d_out: int
    scale: float
    factors: tuple[tuple[str, tuple[int, int]], ...]
    refused: str | None = None


def now() -> str:
    """Return the time as the manifest keeps it: ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def installed_packages() -> dict[str, str]:
    """Return the versions of the packages that a run depends on, without importing them."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_hardware() -> dict[str, Any]:
    """Return what machine this is."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "num_cores": os.cpu_count(),
    }


@dataclass(frozen=True)
class Segment:
    """What an earlier part of a run was that was resumed later. Its files stay as they were left.

    Attributes:
        number: In the names of its files.
        last_step: What it holds of later steps is superseded by later parts.
        num_steps: How many steps it has up to there.
        tables: File and number of rows of each table; of Parquet as in `Manifest`, or of a stream that stayed.
        columns: As in `Manifest`, as all that follows, of this part.
        preset: What was recorded.
        every: Which steps were recorded whole.
        measures: Names of measures.
        command: The command line.
        packages: Versions by package.
        hardware: The machine.
        extra: Anything else.
        started: When this part began.
        ended: When it ended, None if it never said so.
        status: What it said last: `running` if it was killed.
        message: Why it failed or was interrupted.
        process: Who wrote it.
    """

    number: int
    last_step: int
    num_steps: int
    tables: Mapping[str, Mapping[str, Any]]
    columns: Mapping[str, Sequence[Sequence[str]]]
    preset: str
    every: str
    measures: tuple[str, ...]
    command: tuple[str, ...]
    packages: Mapping[str, str]
    hardware: Mapping[str, Any]
    extra: Mapping[str, Any]
    started: str
    ended: str | None
    status: str
    message: str | None
    process: Mapping[str, Any] | None


@dataclass(frozen=True)
class Manifest:
    """What a run says of itself.

    Of a run that was resumed, `method`, `problem`, `base_learning_rate`, the seeds, `modules` and `started` are those
    of its beginning; everything else describes its last part, and `segments` the earlier ones.

    Attributes:
        command: The command line that ran.
        method: What was trained.
        problem: What was learned.
        preset: What was recorded.
        every: Which steps were recorded whole.
        base_learning_rate: The learning rate before scheduling.
        init_seed: Seed of the initialisation.
        data_seed: Seed of the order of the data.
        modules: The adapted layers.
        packages: Versions by package.
        hardware: The machine.
        started: ISO 8601, UTC.
        ended: The same, None while the run is written.
        status: `running`, `complete`, `failed` or `interrupted`.
        message: Why it failed or was interrupted.
        extra: Anything else, JSON-able.
        measures: Names of the measures that were taken beyond what every run has.
        columns: Per table, name and kind of each column that they added.
        num_steps: How many steps the training is going to have, where that is known.
        tables: Of a complete run: file, number of rows and checksum of the footer of each table.
        schema_version: Of the run folder.
        segments: The earlier parts of a run that was resumed, oldest first.
        number: In the names of the files of the last part.
        resumed: When the last part began, None if it is the only one.
        process: Who writes the last part: `pid`, `host` and, where known, `started`; None before schema version 3.
    """

    command: tuple[str, ...]
    method: str | None = None
    problem: str | None = None
    preset: str = "standard"
    every: str = "1"
    base_learning_rate: float | None = None
    init_seed: int | None = None
    data_seed: int | None = None
    modules: tuple[ModuleRecord, ...] = ()
    packages: Mapping[str, str] = field(default_factory=installed_packages)
    hardware: Mapping[str, Any] = field(default_factory=describe_hardware)
    started: str = field(default_factory=now)
    ended: str | None = None
    status: str = "running"
    message: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    measures: tuple[str, ...] = ()
    columns: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    num_steps: int | None = None
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    segments: tuple[Segment, ...] = ()
    number: int = 1
    resumed: str | None = None
    process: Mapping[str, Any] | None = None


def numbers_of(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Return the number of each module and of each name of a factor."""
    factors = dict.fromkeys(name for record in manifest.modules for name, _ in record.factors)
    return {
        "module": {record.module: number for number, record in enumerate(manifest.modules)},
        "factor": {name: number for number, name in enumerate(factors)},
    }


def write_manifest(
    folder: Path, manifest: Manifest, *, part_name: str = f"{MANIFEST}.part", durable: bool = True
) -> None:
    """Replace the manifest of `folder` whole: a reader sees the old one or the new one.

    Args:
        folder: The run folder.
        manifest: What the run says of itself.
        part_name: Of the file that becomes the manifest; another one where this call may interrupt another call.
        durable: Whether to wait until the disk has it, so that it outlives a power failure.
    """
    # Through JSON once before the checksum is taken: keys that are numbers are sorted otherwise as text.
    values = json.loads(json.dumps(asdict(manifest)))
    document = {"crc32": zlib.crc32(json.dumps(values, sort_keys=True).encode()), **values}
    part = folder / part_name
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        part.replace(folder / MANIFEST)
    except Exception:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a run folder.

    Raises:
        RunError: There is none, or it is of a schema that this version does not know.
        DamageError: Its checksum is wrong or it is no JSON.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise RunError(str(folder), expected="a run folder", got=f"no {MANIFEST} in it", do="check the path")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = int(document["schema_version"])
        crc = document.pop("crc32")
        intact = crc == zlib.crc32(json.dumps(document, sort_keys=True).encode())
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not intact:
        raise _damaged(path, "a wrong checksum")
    if version > SCHEMA_VERSION:
        raise RunError(
            str(path),
            expected=f"schema version {SCHEMA_VERSION} or older",
            got=f"version {version}",
            do="install the linchain-analysis that wrote it, "
            + str(document.get("packages", {}).get("linchain-analysis", "a newer one")),
        )
    known = {f.name for f in fields(Manifest)}
    values = {name: value for name, value in document.items() if name in known}
    values["command"] = tuple(values["command"])
    values["measures"] = tuple(values.get("measures", ()))
    values["modules"] = tuple(
        ModuleRecord(**{**record, "factors": tuple((name, tuple(shape)) for name, shape in record["factors"])})
        for record in values["modules"]
    )
    values["segments"] = tuple(_to_segment(segment) for segment in values.get("segments", ()))
    return Manifest(**values)


def _to_segment(values: Mapping[str, Any]) -> Segment:
    known = {f.name: values[f.name] for f in fields(Segment)}
    return Segment(**{**known, "command": tuple(known["command"]), "measures": tuple(known["measures"])})


def _damaged(path: Path, what: str) -> DamageError:
    return DamageError(str(path), expected="an intact manifest", got=what, do="restore the file from a copy")
