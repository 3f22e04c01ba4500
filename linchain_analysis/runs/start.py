"""Where a training began, kept beside its tables: what delta and balance are measured from."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from linchain_analysis.errors import DamageError

FACTORS = "initial_factors.safetensors"
SQUARES = "initial_squares.safetensors"
_CRC = "crc32"

Arrays = Mapping[str, NDArray[np.floating]]


def save_start(folder: Path, factors: Arrays, squares: Arrays) -> None:
    """Keep the factors that delta is measured from, by `module/factor`, and the squares that balance is measured from.

    What is empty makes no file.
    """
    for name, arrays in ((FACTORS, factors), (SQUARES, squares)):
        if arrays:
            _write(folder / name, {key: np.ascontiguousarray(value) for key, value in arrays.items()})


def read_start(folder: Path) -> tuple[Arrays, Arrays]:
    """Return the factors and the squares that `save_start` kept; empty where there was nothing to keep.

    Raises:
        DamageError: A file is damaged.
    """
    return _read(folder / FACTORS), _read(folder / SQUARES)


def _write(path: Path, arrays: Arrays) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(dict(arrays), part, metadata={_CRC: str(_checksum(arrays))})
        part.replace(path)
    except Exception:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _read(path: Path) -> Arrays:
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            kept = (file.metadata() or {}).get(_CRC)  # none before schema version 3
            found: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except Exception as error:  # what it raises on damage is not documented
        raise _damaged(path, str(error)) from error
    if kept is not None and kept != str(_checksum(found)):
        raise _damaged(path, "a wrong checksum")
    return found


def _checksum(arrays: Arrays) -> int:
    """Of names, dtypes, shapes and values."""
    crc = 0
    for name in sorted(arrays):
        array = arrays[name]
        crc = zlib.crc32(f"{name}:{array.dtype.str}:{array.shape}|".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
    return crc


def _damaged(path: Path, what: str) -> DamageError:
    return DamageError(str(path), expected="an intact safetensors file", got=what, do="restore the file from a copy")
