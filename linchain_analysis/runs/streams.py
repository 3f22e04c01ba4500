"""Append-only Arrow streams whose every batch carries a checksum.

A stream that was cut short, by a kill or because it is still being written, holds whole batches up to the cut. Any
other fault is damage: without the checksum most flipped bits would read as other numbers.
"""

from __future__ import annotations

import io
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from linchain_analysis.errors import DamageError, RunError

_CRC = b"crc32"
_INDEX = b"batch"
_CONTINUATION = b"\xff\xff\xff\xff"


class StreamWriter:
    """Appends batches to one file; each is in the hands of the operating system when `append` returns."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self._file = path.open("xb", buffering=0)
        self._identity = _identify(os.fstat(self._file.fileno()))
        self._collected = io.BytesIO()
        self._writer = pa.ipc.new_stream(pa.PythonFile(self._collected, mode="w"), schema)
        self._schema = schema
        self._num_batches = 0
        self._fault: OSError | None = None

    def append(self, columns: Mapping[str, pa.Array]) -> int:
        """Write one batch and return how many bytes that took.

        Raises:
            RunError: The file, or its folder, was deleted or replaced.
            OSError: It could not be written; the stream ends with the batch before.
        """
        if self._fault is not None:
            raise self._fault
        self.check_place()
        batch = pa.record_batch([columns[name] for name in self._schema.names], schema=self._schema)
        crc = checksum(batch, self._num_batches)
        self._writer.write_batch(
            batch, custom_metadata={_CRC: str(crc).encode(), _INDEX: str(self._num_batches).encode()}
        )
        self._num_batches += 1
        return self._hand_over()

    def check_place(self) -> None:
        """Raise unless the file still stands where it was made: else what is written would be in nobody's hands.

        Raises:
            RunError: It does not.
        """
        try:
            found = _identify(os.stat(self.path))
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if found != self._identity:
            raise RunError(
                f"the run folder {self.path.parent}",
                expected=f"the {self.path.name} that is being written",
                got=f"{'none' if found is None else 'another one'}: it vanished or was replaced",
                do="leave a run alone while it is written",
            )

    def close(self) -> None:
        """Write the end mark and close the file."""
        try:
            self._writer.close()
            if self._fault is None:
                self._hand_over()
        finally:
            self._file.close()

    def _hand_over(self) -> int:
        """Give what Arrow wrote to the operating system in one call, so that a kill cuts at most this batch."""
        data = self._collected.getvalue()
        self._collected.seek(0)
        self._collected.truncate()
        start = self._file.tell()
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            # What came after half a batch would be damage, so the stream ends where its last whole batch does.
            self._fault = error
            self._file.truncate(start)
            raise
        return len(data)


def checksum(batch: pa.RecordBatch, index: int) -> int:
    """CRC32 of the values of a batch, its length and its place in the stream."""
    crc = zlib.crc32(f"{index}:{batch.num_rows}:{batch.num_columns}".encode())
    for column in batch.columns:
        for buffer in column.buffers():
            if buffer is not None:
                crc = zlib.crc32(buffer, crc)
            crc = zlib.crc32(b"|", crc)
    return crc


def read_stream(path: Path, schema: pa.Schema) -> pa.Table:
    """Read the whole batches of a stream that must hold `schema`.

    Raises:
        DamageError: A batch is wrong, or something that is no batch stands before the end.
    """
    try:
        batches = list(_read_batches(path.read_bytes(), schema))
    except _Damage as damage:
        raise _error(path, damage) from None
    return pa.Table.from_batches(batches, schema=schema)


def read_until_damage(path: Path, schema: pa.Schema) -> tuple[pa.Table, bool]:
    """Read what stands before damage, with a warning if there is any; return it and whether that is all."""
    try:
        batches = list(_read_batches(path.read_bytes(), schema))
    except _Damage as damage:
        warnings.warn(f"{path}: {damage}; {len(damage.before)} batches before it are read.", stacklevel=2)
        return pa.Table.from_batches(damage.before, schema=schema), False
    return pa.Table.from_batches(batches, schema=schema), True


class _Damage(Exception):
    def __init__(self, what: str, before: list[pa.RecordBatch]) -> None:
        super().__init__(what)
        self.before = before


def _read_batches(data: bytes, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    done: list[pa.RecordBatch] = []
    source = pa.BufferReader(data)
    try:
        reader = pa.ipc.open_stream(source)
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        if _is_cut(data, 0):
            return
        raise _Damage(f"no stream ({error})", done) from error
    if reader.schema != schema:
        raise _Damage("other columns", done)
    while True:
        start = source.tell()
        try:
            batch, found = reader.read_next_batch_with_custom_metadata()
            batch.validate(full=True)
        except StopIteration:
            # The end mark is eight bytes, continuation and zero; anything after it was unreachable by a flipped length.
            if data[start : start + 8] in (b"", _CONTINUATION + b"\0\0\0\0") and source.tell() >= len(data):
                return
            raise _Damage(f"an end mark at byte {start} of {len(data)}", done) from None
        except (pa.ArrowException, OSError, ValueError, EOFError, OverflowError, MemoryError) as error:
            if _is_cut(data, start):
                return
            raise _Damage(f"no batch at byte {start} ({error})", done) from error
        if found is None or found.get(_CRC) != str(checksum(batch, len(done))).encode():
            raise _Damage(f"a wrong checksum in batch {len(done)}", done)
        done.append(batch)
        yield batch


def _is_cut(data: bytes, start: int) -> bool:
    """Whether the bytes from `start` are the beginning of one message that was never finished.

    A flipped bit in a length looks alike, but leaves the beginnings of later messages behind it.
    """
    rest = data[start:]
    if len(rest) < 8:
        return _CONTINUATION.startswith(rest[:4])
    if rest[:4] != _CONTINUATION:
        return False
    length = int.from_bytes(rest[4:8], "little", signed=True)
    if length < 0:
        return False
    body = rest[8:]
    next_message = body.find(_CONTINUATION)
    while next_message >= 0:
        if _holds_batch(body[next_message:]):
            return False
        next_message = body.find(_CONTINUATION, next_message + 1)
    return len(body) < length or _body_is_short(rest)


def _body_is_short(rest: bytes) -> bool:
    try:
        pa.ipc.read_message(pa.BufferReader(rest))
    except (pa.ArrowException, OSError, ValueError, EOFError):
        return True
    return False


def _holds_batch(data: bytes) -> bool:
    try:
        return bool(pa.ipc.read_message(pa.BufferReader(data)).type == "record batch")
    except (pa.ArrowException, OSError, ValueError, EOFError, OverflowError, MemoryError):
        return False


def _identify(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _error(path: Path, damage: _Damage) -> DamageError:
    return DamageError(
        str(path),
        expected="a stream of intact batches",
        got=str(damage),
        do='restore the file from a copy, or read what stands before with load_run(path, damaged="drop")',
    )
