"""Arrow columns as pandas columns."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from linchain_analysis.runs.conversion import make_frame, map_to_categories, map_to_numbers, to_categories, to_columns


def encode(*chunks: list[str | None]) -> pa.ChunkedArray:
    kind = pa.dictionary(pa.int32(), pa.string())
    return pa.chunked_array([pa.array(chunk, pa.string()).dictionary_encode() for chunk in chunks], type=kind)


def test_categories_are_those_of_the_run_whatever_order_a_file_has() -> None:
    column = encode(["b", "a", "b"], [], ["c", None, "a"])
    found = to_categories(column, ["a", "b", "c", "never"])
    assert list(found.categories) == ["a", "b", "c", "never"]
    assert found.tolist() == ["b", "a", "b", "c", np.nan, "a"]
    assert found.codes.dtype == np.int8


def test_a_name_that_nobody_declared_is_kept() -> None:
    assert to_categories(encode(["x", "a"]), ["a"]).tolist() == ["x", "a"]
    assert to_categories(encode(), ["a"]).tolist() == []
    assert to_categories(encode(), []).tolist() == []


@pytest.mark.parametrize("num_names", [127, 128, 129, 40_000])
def test_many_names_have_room(num_names: int) -> None:
    names = [f"m{number}" for number in range(num_names)]
    found = to_categories(encode([*names[::-1], None]), names)
    assert found.tolist() == [*names[::-1], np.nan]


def test_what_the_manifest_says_of_a_name() -> None:
    values = pd.Categorical(["q", None, "up", "q", "odd"], categories=["up", "q", "odd"])
    kinds = map_to_categories(values, {"q": "q_proj", "up": "a_proj", "odd": None})
    assert kinds.tolist() == ["q_proj", np.nan, "a_proj", "q_proj", np.nan]
    assert list(kinds.categories) == ["a_proj", "q_proj"]
    layers = map_to_numbers(values, {"q": 3, "up": None})
    assert layers.dtype == pd.Int64Dtype()
    assert layers.tolist() == [3, pd.NA, pd.NA, 3, pd.NA]


def test_nothing_is_known_of_no_names() -> None:
    nothing = pd.Categorical([None, None], categories=[])
    assert map_to_categories(nothing, {}).isna().all()
    assert map_to_numbers(nothing, {}).isna().all()


def test_numbers_keep_their_kind_and_can_be_changed() -> None:
    rows = pa.table(
        {
            "step": pa.array([1, 2], pa.int32()),
            "tokens": pa.array([5, None], pa.int64()),
            "x": pa.array([0.5, 1.5], pa.float32()),
            "y": pa.array([None, 1.5], pa.float64()),
            "s": pa.array([[1.0, 2.0], None], pa.list_(pa.float32())),
        }
    )
    frame = make_frame(to_columns(rows, {}))
    assert [str(dtype) for dtype in frame.dtypes] == ["int64", "Int64", "float32", "float64", "object"]
    assert frame["tokens"].tolist() == [5, pd.NA]
    assert np.isnan(frame["y"][0]) and frame["s"][1] is None
    frame.loc[0, "x"] = 9.0
    assert rows["x"].to_pylist() == [0.5, 1.5]
