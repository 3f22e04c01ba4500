"""Columns that grow at the end, without being copied at each growth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Growing:
    """Float64 columns of one length.

    Args:
        names: Of the columns.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._places = {name: place for place, name in enumerate(names)}
        self._values = np.full((len(names), 64), np.nan)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """Return a view of a column; what is assigned to it is kept."""
        return self._values[self._places[name], : self._length]

    def append(self, rows: Mapping[str, NDArray[Any]], count: int) -> None:
        """Add `count` rows; NaN in columns that are not given."""
        needed = self._length + count
        if needed > self._values.shape[1]:
            larger = np.full((len(self._places), max(needed, 2 * self._values.shape[1])), np.nan)
            larger[:, : self._length] = self._values[:, : self._length]
            self._values = larger
        for name, values in rows.items():
            self._values[self._places[name], self._length : needed] = values
        self._length = needed
