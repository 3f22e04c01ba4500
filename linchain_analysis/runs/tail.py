"""Follow a live stream: read what was appended since the last look, and only that."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from linchain_analysis.errors import DamageError
from linchain_analysis.runs.streams import _CRC, _is_cut, checksum

# Read at once: enough that a batch is rarely cut, little enough that a run of hundreds of megabytes needs no memory.
_CHUNK = 1 << 24
_END = b"\xff\xff\xff\xff\0\0\0\0"


class StreamTail:
    """The whole batches of a stream that grows, each given once, under the same rules as `read_stream`.

    The file is opened for each look and only for reading, so that a run can be deleted or completed meanwhile.

    Args:
        path: The stream.
        schema: What it must hold.
        chunk: How many bytes to read at once.
    """

    def __init__(self, path: Path, schema: pa.Schema, *, chunk: int = _CHUNK) -> None:
        self.path = path
        self._schema = schema
        self._chunk = chunk
        self._header = b""  # the message that names the columns, put before every piece that is read
        self._offset = 0  # behind the last whole batch
        self._num_batches = 0
        self._inode: int | None = None
        self._ended = False

    @property
    def offset(self) -> int:
        """How many bytes of the file have been read into batches."""
        return self._offset

    def read(self) -> pa.Table:
        """Return the rows of whole batches that were appended since the last call.

        Raises:
            FileNotFoundError: There is no such file, or not any more.
            DamageError: A batch is wrong, something that is no batch stands before the end, or the file is another
                one than before.
        """
        pieces = list(self.pieces())
        return pa.concat_tables(pieces) if pieces else self._schema.empty_table()

    def pieces(self) -> Iterator[pa.Table]:
        """Yield what `read` returns bit by bit, so that a long stream need not be held in memory."""
        size = self._chunk
        with self.path.open("rb", buffering=0) as file:
            self._check_identity(file.fileno())
            while True:
                data = _read(file.fileno(), self._offset, size)
                at_end = len(data) < size
                batches = self._parse(data, at_end=at_end)
                if batches:
                    yield pa.Table.from_batches(batches, schema=self._schema)
                if at_end:
                    return
                size = self._chunk if batches else 2 * size

    def _check_identity(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if self._inode not in (None, status.st_ino) or status.st_size < self._offset:
            raise self._error("another file than before")
        self._inode = status.st_ino

    def _parse(self, data: bytes, *, at_end: bool) -> list[pa.RecordBatch]:
        """Return the whole batches of `data`, which stands at the offset, and move the offset behind them."""
        if self._ended:
            if data:
                raise self._error(f"something behind the end mark at byte {self._offset}")
            return []
        if not data:
            return []
        whole = self._header + data
        shift = self._offset - len(self._header)  # from places in `whole` to places in the file
        source = pa.BufferReader(whole)
        try:
            reader = pa.ipc.open_stream(source)
        except (pa.ArrowException, OSError, ValueError, EOFError) as error:
            if not at_end or _is_cut(whole, 0):
                return []
            raise self._error(f"no stream ({error})") from error
        if reader.schema != self._schema:
            raise self._error("other columns")
        if not self._header:
            self._header = whole[: source.tell()]
            self._offset, shift = len(self._header), 0
        found: list[pa.RecordBatch] = []
        while True:
            start = source.tell()
            try:
                batch, said = reader.read_next_batch_with_custom_metadata()
                batch.validate(full=True)
            except StopIteration:
                # A piece ends where it was cut, which Arrow takes for the end of the stream as well.
                self._ended = whole[start:] == _END
                if self._ended:
                    self._offset += len(_END)
                elif len(whole) > start and (at_end or whole[start : start + 8] == _END):
                    raise self._error(f"an end mark at byte {start + shift}") from None
                return found
            except (pa.ArrowException, OSError, ValueError, EOFError, OverflowError, MemoryError) as error:
                if not at_end or _is_cut(whole, start):
                    return found
                raise self._error(f"no batch at byte {start + shift} ({error})") from error
            if said is None or said.get(_CRC) != str(checksum(batch, self._num_batches)).encode():
                raise self._error(f"a wrong checksum in batch {self._num_batches}")
            found.append(batch)
            self._num_batches += 1
            self._offset = source.tell() + shift

    def _error(self, what: str) -> DamageError:
        return DamageError(
            str(self.path), expected="a stream of intact batches", got=what, do="restore the file from a copy"
        )


def _read(descriptor: int, offset: int, size: int) -> bytes:
    """Read `size` bytes at `offset`, fewer only at the end of the file."""
    parts = []
    while size:
        part = os.pread(descriptor, size, offset)
        if not part:
            break
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
