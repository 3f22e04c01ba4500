"""Statistics of pairs, by hand-computed values, and the rows that carry them."""

import json
from pathlib import Path

import numpy as np
import pytest

from linchain_analysis.benchmarks.growth import fit_slope, slope_row
from linchain_analysis.benchmarks.rows import Row, compare, skip, summarise, write_rows
from linchain_analysis.benchmarks.timing import Timings, Variant, take_turns

KEYS = {"name", "ratio_median", "ratio_q25", "ratio_q75", "target", "met"}


def timings(cpu: list[float], wall: list[float]) -> Timings:
    return Timings(np.array(cpu), np.array(wall))


def test_ratios_are_taken_pair_by_pair() -> None:
    # Ratios 1.1, 1.2, 1.3, 1.0, 1.4 by CPU; the ratio of the medians, 5.5 / 5, would be 1.1.
    over = timings([1.1, 2.4, 13.0, 5.0, 14.0], [2.0, 4.0, 20.0, 10.0, 20.0])
    under = timings([1.0, 2.0, 10.0, 5.0, 10.0], [1.0, 2.0, 10.0, 5.0, 10.0])
    row = compare("topic/what", over, under, target=1.2)
    assert (row.q25, row.median, row.q75) == pytest.approx((1.1, 1.2, 1.3))
    assert row.met is True
    assert row.extra["wall_ratio_median"] == 2.0
    assert row.extra["num_pairs"] == 5
    by_wall = compare("topic/what", over, under, clock="wall", target=1.2)
    assert by_wall.median == 2.0
    assert by_wall.met is False


def test_quartiles_interpolate_and_leave_out_what_is_not_finite() -> None:
    row = summarise("topic/what", [4.0, 1.0, np.inf, 2.0, np.nan, 3.0], unit="milliseconds", target=2.4)
    assert (row.q25, row.median, row.q75) == (1.75, 2.5, 3.25)
    assert row.met is False
    one = summarise("topic/what", 7.0, unit="bytes")
    assert (one.q25, one.median, one.q75, one.met) == (7.0, 7.0, 7.0, None)


def test_nothing_finite_is_no_result() -> None:
    row = summarise("topic/what", [np.nan], target=1.0)
    assert (row.median, row.target, row.met) == (None, None, None)
    assert "nothing finite" in row.note


def test_rows_as_json(tmp_path: Path) -> None:
    rows = [Row("a/b", "seconds", 1.5, 1.0, 2.0, 1.0, {"clock": "wall"}), skip("a/c", "it is not installed")]
    write_rows(tmp_path / "new" / "rows.json", rows, "a machine")
    measured, skipped = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert set(measured) >= KEYS
    assert set(skipped) >= KEYS
    assert (measured["ratio_median"], measured["met"], measured["clock"]) == (1.5, False, "wall")
    assert measured["machine"] == "a machine"
    assert skipped["ratio_median"] is None
    assert skipped["met"] is None
    assert skipped["note"] == "skipped: it is not installed"


def test_variants_take_turns_there_and_back() -> None:
    order: list[str] = []
    variants = [
        Variant(name, lambda name=name: order.append(name), lambda name=name: order.append(f"before {name}"))
        for name in ("a", "b")
    ]
    found = take_turns(variants, 3, num_warmups=1)
    ran = [name for name in order if not name.startswith("before")]
    assert ran == ["a", "b", "a", "b", "b", "a", "a", "b"]  # one warm-up each, then A B, B A, A B
    assert order[::2] == [f"before {name}" for name in ran]
    assert found["a"].cpu.shape == found["b"].wall.shape == (3,)


def test_slope_of_powers() -> None:
    sizes = (20, 40, 80, 160)
    milliseconds = np.array([[size**0.5, 3.0 * size, size**2.0] for size in sizes])
    np.testing.assert_allclose(fit_slope(sizes, milliseconds), [0.5, 1.0, 2.0], rtol=1e-12)
    row = slope_row("growth/modules/slope", sizes, [np.array([size, 2.0 * size, size]) for size in sizes], 1.0)
    assert row.median == pytest.approx(1.0, rel=1e-12)
    assert row.target == 1.0
    # A difference of two noisy times may come out below 0, and its row still has a number.
    below = slope_row("growth/modules/slope", sizes, [np.array([-1.0, -2.0]) for _ in sizes], 1.0)
    assert below.median == pytest.approx(0.0, abs=1e-12)
    assert below.met is True
