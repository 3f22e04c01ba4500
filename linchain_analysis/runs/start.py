"""Where a training began, kept beside its tables: what delta and balance are measured from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from linchain_analysis.errors import DamageError

FACTORS = "initial_factors.safetensors"
SQUARES = "initial_squares.safetensors"

Arrays = Mapping[str, NDArray[np.floating]]


def save_start(folder: Path, factors: Arrays, squares: Arrays) -> None:
    """Keep the factors that delta is measured from, by `module/factor`, and the squares that balance is measured from.

    What is empty makes no file.
    """
    for name, arrays in ((FACTORS, factors), (SQUARES, squares)):
        if arrays:
            save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, folder / name)


def read_start(folder: Path) -> tuple[Arrays, Arrays]:
    """Return the factors and the squares that `save_start` kept; empty where there was nothing to keep.

    Raises:
        DamageError: A file is damaged.
    """
    return _read(folder / FACTORS), _read(folder / SQUARES)


def _read(path: Path) -> Arrays:
    if not path.exists():
        return {}
    try:
        found: Arrays = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DamageError(
            str(path), expected="a safetensors file", got=str(error), do="restore the file from a copy"
        ) from error
    return found
