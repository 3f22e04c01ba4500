"""Tables of a complete run as Parquet, with checksums on every page and, in the manifest, of the footer."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from linchain_analysis.errors import DamageError

# Pages are checked by their own checksums; what says where they are and what they mean is the footer.
_TAIL = 8  # four bytes of length and the magic word


def name_columns(table: pa.Table, numbers: Mapping[str, Mapping[str, int]]) -> pa.Table:
    """Replace numbers of modules and factors by their names, dictionary-encoded."""
    for column, by_name in numbers.items():
        position = table.schema.get_field_index(column)
        if position >= 0:
            indices = table.column(position).combine_chunks()
            names = pa.DictionaryArray.from_arrays(indices, pa.array(list(by_name), type=pa.string()))
            table = table.set_column(position, column, names)
    return table


def write_parquet(path: Path, table: pa.Table, *, durable: bool = True) -> dict[str, Any]:
    """Write `table` whole or not at all; return what the manifest keeps of the file.

    Args:
        path: The file.
        table: What it holds.
        durable: Whether to wait until the disk has it, so that it outlives a power failure.
    """
    part = path.with_name(f"{path.name}.part")
    # Measured numbers hardly repeat: a dictionary of them costs more than they do, while their bytes apart, exponents
    # with exponents, are what zstd can shorten.
    split = [_leaf(field) for field in table.schema if pa.types.is_floating(_value_type(field.type))]
    repeating = [field.name for field in table.schema if _repeats(field.type)]
    try:
        pq.write_table(
            table,
            part,
            compression="zstd",
            use_dictionary=repeating,
            column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
            write_statistics=[_leaf(field) for field in table.schema if not pa.types.is_binary(field.type)],
            write_page_checksum=True,
            store_schema=True,
        )
        if durable:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        part.replace(path)
    except Exception:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    return {"file": path.name, "num_rows": table.num_rows, "footer_crc32": _footer_checksum(path)}


def read_parquet(folder: Path, entry: Mapping[str, Any], columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of a Parquet file that the manifest describes by `entry`.

    Raises:
        DamageError: The file is gone, or any checksum is wrong.
    """
    path = folder / str(entry["file"])
    if not path.is_file():
        raise _error(path, "no such file")
    try:
        if _footer_checksum(path) != entry["footer_crc32"]:
            raise _error(path, "a wrong checksum of its footer")
        table = pq.read_table(path, columns=columns, page_checksum_verification=True, memory_map=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DamageError):
            raise
        raise _error(path, str(error)) from error
    if table.num_rows != entry["num_rows"]:
        raise _error(path, f"{table.num_rows} rows instead of {entry['num_rows']}")
    return table


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_list(kind) else kind


def _leaf(field: pa.Field) -> str:
    """Path of the values of a field in Parquet."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else str(field.name)


def _repeats(kind: pa.DataType) -> bool:
    """Whether a column holds few values many times: steps, names, counts."""
    return bool(pa.types.is_dictionary(kind) or pa.types.is_string(kind) or pa.types.is_integer(kind))


def _footer_checksum(path: Path) -> int:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < _TAIL + 4:
            raise _error(path, f"{size} bytes")
        file.seek(size - _TAIL)
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(size - _TAIL - length, 0))
        crc = zlib.crc32(file.read())
        file.seek(0)
        return zlib.crc32(file.read(4), crc) ^ size


def _error(path: Path, what: str) -> DamageError:
    return DamageError(
        str(path), expected="the intact Parquet file of a complete run", got=what, do="restore the file from a copy"
    )
