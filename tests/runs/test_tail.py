"""A stream that is followed gives what reading it whole gives, each row once, and finds the same damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from linchain_analysis.errors import DamageError
from linchain_analysis.runs.schema import LIVE
from linchain_analysis.runs.streams import StreamWriter, read_stream
from linchain_analysis.runs.tail import StreamTail

SCHEMA = LIVE["modules"]
CHUNKS = (100, 1 << 24)


def batch(step: int, rows: int = 2) -> dict[str, pa.Array]:
    values: dict[str, object] = {"step": [step] * rows, "module": list(range(rows))}
    values["spectrum"] = [np.arange(3, dtype=np.float32) + step] * rows
    return {field.name: pa.array(values.get(field.name, [None] * rows), type=field.type) for field in SCHEMA}


def write(path: Path, num_batches: int, *, close: bool) -> list[int]:
    """Write a stream and return where it stood after each batch."""
    writer = StreamWriter(path, SCHEMA)
    ends = []
    for step in range(1, num_batches + 1):
        writer.append(batch(step))
        ends.append(path.stat().st_size)
    if close:
        writer.close()
    return ends


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("close", [True, False])
def test_each_batch_is_given_once_as_soon_as_it_is_whole(tmp_path: Path, chunk: int, close: bool) -> None:
    ends = write(tmp_path / "whole", 4, close=close)
    data = (tmp_path / "whole").read_bytes()
    growing = tmp_path / "growing"
    growing.write_bytes(b"")
    tail = StreamTail(growing, SCHEMA, chunk=chunk)
    steps: list[int] = []
    for size in range(0, len(data) + 1, 3):
        with growing.open("r+b") as file:
            file.write(data[:size])
        steps += tail.read()["step"].to_pylist()
        assert steps == [step for step, end in enumerate(ends, 1) if end <= size for _ in range(2)]
    growing.write_bytes(data)
    assert steps + tail.read()["step"].to_pylist() == read_stream(growing, SCHEMA)["step"].to_pylist()
    assert tail.offset == len(data)
    assert tail.read().num_rows == 0


@pytest.mark.parametrize("chunk", [333, 1 << 24])
def test_every_flipped_byte_is_judged_as_by_whoever_reads_the_whole(tmp_path: Path, chunk: int) -> None:
    write(tmp_path / "whole", 3, close=True)
    data = (tmp_path / "whole").read_bytes()
    path = tmp_path / "damaged"
    for place in range(0, len(data), 3 if chunk > 333 else 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :])
        try:
            expected = read_stream(path, SCHEMA)
        except DamageError:
            with pytest.raises(DamageError):
                StreamTail(path, SCHEMA, chunk=chunk).read()
        else:
            assert StreamTail(path, SCHEMA, chunk=chunk).read().equals(expected), place


def test_a_long_stream_comes_in_pieces(tmp_path: Path) -> None:
    write(tmp_path / "long", 50, close=False)
    pieces = list(StreamTail(tmp_path / "long", SCHEMA, chunk=4000).pieces())
    assert len(pieces) > 5
    assert pa.concat_tables(pieces).equals(read_stream(tmp_path / "long", SCHEMA))


def test_what_cannot_be_gone_on_with_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    with pytest.raises(FileNotFoundError):
        StreamTail(path, SCHEMA).read()
    write(path, 2, close=True)
    tail = StreamTail(path, SCHEMA)
    tail.read()
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(DamageError, match="another file"):
        tail.read()
    path.write_bytes(data + b"more")
    with pytest.raises(DamageError, match="behind the end mark"):
        tail.read()
    (tmp_path / "other").write_bytes(data + b"0" * 100)
    (tmp_path / "other").replace(path)
    with pytest.raises(DamageError, match="another file"):
        tail.read()
    with pytest.raises(DamageError, match="other columns"):
        StreamTail(path, LIVE["steps"]).read()
