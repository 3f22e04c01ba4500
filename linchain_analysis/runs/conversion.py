"""From Arrow tables to pandas columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray


def to_columns(rows: pa.Table, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return each column as pandas has it: numbers as they are, names as categories, spectra as one array a cell.

    Args:
        rows: What was stored.
        names: Of columns that are dictionaries: all names there are, in the order of the categories.
    """
    found: dict[str, Any] = {}
    for name in rows.column_names:
        column = rows[name]
        if pa.types.is_dictionary(column.type):
            found[name] = to_categories(column, names.get(name, ()))
        elif name == "step" and not column.null_count:
            found[name] = column.to_numpy().astype(np.int64)
        elif pa.types.is_floating(column.type):
            values = column.to_numpy()
            found[name] = values if values.flags.writeable else values.copy()  # Arrow lends what it holds
        else:
            # Through a table: of a column alone pandas would make objects where there is no row.
            found[name] = rows.select([name]).to_pandas(types_mapper=_choose_type)[name]
    return found


def make_frame(columns: Mapping[Any, Any]) -> pd.DataFrame:
    """Return a frame that shares the memory of its columns."""
    frame: pd.DataFrame = pd.DataFrame(dict(columns), copy=False)
    return frame


def to_categories(column: pa.ChunkedArray, names: Sequence[str]) -> pd.Categorical[str]:
    """Return a dictionary-encoded column with `names` as categories, without looking at any row's text."""
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    dictionaries = [chunk.dictionary.to_pylist() for chunk in column.chunks]
    for name in (name for dictionary in dictionaries for name in dictionary):
        places.setdefault(name, len(places))
    kind = np.min_scalar_type(-max(len(places), 1))  # as narrow as pandas would make it
    codes = [np.zeros(0, dtype=kind)]
    for chunk, dictionary in zip(column.chunks, dictionaries, strict=True):
        # The last place is where −1, for a missing name, points to.
        recoded = np.array([*(places[name] for name in dictionary), -1], dtype=kind)
        codes.append(recoded[chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False)])
    return _categorical(np.concatenate(codes), list(places))


def map_to_categories(values: pd.Categorical[str], by_name: Mapping[str, str | None]) -> pd.Categorical[str]:
    """Return the text that belongs to each row's name, as categories in alphabetical order; missing for None."""
    said = [by_name.get(name) for name in values.categories]
    texts = sorted({text for text in said if text is not None})
    codes = np.array([-1 if text is None else texts.index(text) for text in said] + [-1])
    return _categorical(codes[values.codes], texts)


def map_to_numbers(values: pd.Categorical[str], by_name: Mapping[str, int | None]) -> pd.arrays.IntegerArray:
    """Return the number that belongs to each row's name as Int64; missing for None."""
    said = [*(by_name.get(name) for name in values.categories), None]
    numbers = np.array([0 if number is None else number for number in said], dtype=np.int64)
    missing = np.array([number is None for number in said])
    return pd.arrays.IntegerArray(numbers[values.codes], missing[values.codes])


def _categorical(codes: NDArray[np.integer], categories: Sequence[str]) -> pd.Categorical[str]:
    """Categories by number, −1 for a missing one, without a look at whether every number is in range."""
    return pd.Categorical.from_codes(codes, categories=pd.Index(categories), validate=False)


def _choose_type(kind: pa.DataType) -> pd.Int64Dtype | None:
    """Whole numbers stay whole where some are missing."""
    return pd.Int64Dtype() if kind == pa.int64() else None
