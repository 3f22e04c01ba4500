"""Shares of the orders of a step, over modules and seeds."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_training import build, optimize, train_step
from synthetic_runs import FrameRuns, rows

from linchain_analysis import Tracker, load_runs
from linchain_analysis.analysis.orders import average_steps, measure_order_ratios, summarise_orders
from linchain_analysis.errors import InputError

T1 = math.tan(0.475 * math.pi)  # quantile 0.975 of the t distribution with 1 degree of freedom


def modules(method: str, seed: int, ratios: list[list[float] | None], **changes: object) -> pd.DataFrame:
    """One row a step and module `p`, with shares that follow from the first two orders."""
    table = {
        "step": range(1, len(ratios) + 1),
        "module": "p",
        "order_ratios": ratios,
        "first_order_share": [None if r is None else r[0] for r in ratios],
        "interaction_ratio": [None if r is None else r[1] for r in ratios],
        "delta_update_norm": [0.0 if r is None else 1.0 for r in ratios],
    }
    return rows(method, seed, {**table, **changes})


def test_every_order_has_its_row() -> None:
    frame = pd.concat([modules("lora-16", 0, [[1.0, 0.0]]), modules("moslora-16", 0, [[0.9, 0.2, 0.01]])])
    found = measure_order_ratios(FrameRuns(modules=frame))
    assert list(found["order"]) == [1, 2, 1, 2, 3]
    assert list(found["order_ratio"]) == [1.0, 0.0, 0.9, 0.2, 0.01]
    assert list(found["first_order_share"]) == [1.0, 1.0, 0.9, 0.9, 0.9]


def test_means_and_intervals_by_hand() -> None:
    frame = pd.concat([modules("lora-16", 0, [[1.0, 0.1]]), modules("lora-16", 1, [[0.8, 0.3]])])
    more = modules("lora-16", 1, [[0.6, 0.5]], module="q")  # seed 1: means 0.7 and 0.4
    table = summarise_orders(FrameRuns(modules=pd.concat([frame, more], ignore_index=True)))
    assert list(table.columns[:3]) == ["quantity", "order", "problem"]
    by = table.set_index(["quantity", "order"])
    for order, mean, half in ((1, 0.85, 0.15), (2, 0.25, 0.15)):
        row = by.loc[("order_ratio", order)]
        assert row["mean"] == pytest.approx(mean)
        # t · s/√2 with s = |difference|/√2, half of it is half the difference.
        assert row["high"] - row["mean"] == pytest.approx(T1 * half)
        assert row["num_seeds"] == 2
    shares = table[table["order"].isna()].set_index("quantity")["mean"]
    assert shares.to_dict() == pytest.approx({"first_order_share": 0.85, "interaction_ratio": 0.25})


def test_steps_without_an_update_are_left_out_and_divergence_is_not() -> None:
    frame = modules("lora-16", 0, [None, [1.0, 0.1], [1.0, 0.2]])
    frame["order_ratios"] = pd.Series([[np.nan, np.nan], [1.0, 0.1], [np.nan, np.nan]])
    frame["delta_update_norm"] = [0.0, 1.0, np.nan]
    table = summarise_orders(FrameRuns(modules=frame))
    first = table[(table["quantity"] == "order_ratio") & (table["order"] == 1)]
    assert list(first["step"]) == [2, 3]
    assert first["mean"].iloc[0] == 1
    assert math.isnan(first["mean"].iloc[1])


def test_an_average_over_steps() -> None:
    table = summarise_orders(FrameRuns(modules=modules("lora-16", 0, [[1.0, 0.0], [0.9, 0.2], [0.8, 0.4]])))
    found = average_steps(table, first=2).set_index(["quantity", "order"])["mean"]
    assert found["order_ratio", 1] == pytest.approx(0.85)
    assert found["order_ratio", 2] == pytest.approx(0.3)
    assert average_steps(table, 2, 2).set_index(["quantity", "order"])["mean"]["order_ratio", 2] == pytest.approx(0.2)


def test_runs_without_orders(tmp_path: Path) -> None:
    frame = modules("lora-16", 0, [None, None])
    with pytest.raises(InputError, match=r"orders: .*preset `full`"):
        summarise_orders(FrameRuns(modules=frame))
    model = build("lora-4")
    optimizer = optimize(model)
    with Tracker(model, optimizer, tmp_path / "run", preset="light"):
        train_step(model, optimizer, 1)
    with pytest.raises(InputError, match=r"orders: .*preset `full`"):
        summarise_orders(load_runs([tmp_path / "run"]))


def test_real_runs(tmp_path: Path) -> None:
    for method in ("lora-4", "linchain-2-4"):
        model = build(method)
        optimizer = optimize(model, "Adam")  # whose first step leaves alone what has no gradient; AdamW's decays it
        with Tracker(model, optimizer, tmp_path / method, preset="full", method=method, init_seed=0, data_seed=0):
            for step in range(1, 7):
                train_step(model, optimizer, step)
    table = summarise_orders(load_runs(tmp_path))
    ratios = table[table["quantity"] == "order_ratio"]
    assert ratios.groupby("method", observed=True)["order"].max().to_dict() == {"lora-4": 2, "linchain-2-4": 4}
    start = ratios[ratios["step"] == 1]
    # At the first step only B moves.
    np.testing.assert_allclose(start["mean"], (start["order"] == 1).astype(float), rtol=0, atol=1e-7)
    for _, own in ratios[ratios["step"] > 1].groupby(["method", "step"], observed=True):
        assert (np.diff(own.sort_values("order")["mean"]) < 0).all()
        assert own["mean"].sum() >= 1 - 1e-6  # triangle inequality
