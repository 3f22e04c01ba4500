"""Figures of chains as they start, and of the orders of a step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_runs import FrameRuns, rows
from typer.testing import CliRunner

from linchain_analysis.analysis.initialisation import measure_initial_chains
from linchain_analysis.analysis.orders import summarise_orders
from linchain_analysis.errors import InputError
from linchain_analysis.figures import app
from linchain_analysis.method_names import CHAIN_INITS
from linchain_analysis.plots.initialisation import plot_initialisation
from linchain_analysis.plots.orders import plot_orders


@pytest.fixture(scope="module")
def draws() -> pd.DataFrame:
    return measure_initial_chains(d_in=64, ranks=(4, 8), lengths=range(4), num_draws=9)


def test_initial_chains_are_drawn_as_they_are(draws: pd.DataFrame) -> None:
    drawn = plot_initialisation(draws)
    assert len(drawn.figure.axes) == 3 * 2
    assert set(drawn.table["quantity"]) == {"condition_number", "effective_rank_share", "mean_square"}
    assert len(drawn.table) == 3 * 2 * len(CHAIN_INITS) * 4
    for row, quantity in enumerate(("condition_number", "effective_rank_share", "mean_square")):
        axes = drawn.figure.axes[2 * row]
        here = drawn.table[(drawn.table["quantity"] == quantity) & (drawn.table["rank"] == 4)]
        for line, (_, curve) in zip(axes.lines, here.groupby("init", sort=False), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), curve["median"])
            np.testing.assert_array_equal(line.get_xdata(), [0, 1, 2, 3])
    share = drawn.table[drawn.table["quantity"] == "effective_rank_share"]
    assert share["high"].max() <= 1
    own = draws[(draws["rank"] == 8) & (draws["init"] == "he") & (draws["chain_length"] == 3)]["effective_rank"]
    told = share[(share["rank"] == 8) & (share["init"] == "he") & (share["chain_length"] == 3)]
    assert told["median"].item() == pytest.approx(own.median() / 8, rel=1e-15)
    assert "median over 9 draws (d_in = 64, seed 0)" in drawn.caption
    assert "kaiming, he, lecun differ in scale alone" in drawn.caption


def test_bands_that_coincide_are_drawn_once(draws: pd.DataFrame) -> None:
    figure = plot_initialisation(draws).figure
    # kaiming = he = lecun, and orthogonal = identity, in condition number; all but the last two differ in scale.
    assert [len(axes.collections) for axes in figure.axes[::2]] == [2, 2, 4]


def test_a_panel_for_every_width() -> None:
    table = measure_initial_chains(d_in=32, ranks=(4,), lengths=(0, 2), widths=(None, 6), num_draws=3, inits=("he",))
    drawn = plot_initialisation(table)
    assert [axes.get_title() for axes in drawn.figure.axes[:2]] == ["$r = 4$", "$r = 4$, width 6"]
    assert "scale alone" not in drawn.caption


def test_what_cannot_be_drawn(draws: pd.DataFrame) -> None:
    with pytest.raises(InputError, match="an empty table"):
        plot_initialisation(draws.iloc[:0])
    with pytest.raises(InputError, match="got xavier"):
        plot_initialisation(draws.assign(init="xavier"))


def test_the_door(tmp_path: Path) -> None:
    out = tmp_path / "initialisation"
    done = CliRunner().invoke(app, ["--initialisation", "--out", str(out), "--format", "png"])
    assert done.exit_code == 0, done.output
    names = {"figure.png", "drawn.csv", "caption.txt", "provenance.json"}
    assert {file.name for file in out.iterdir()} == names
    assert json.loads((out / "provenance.json").read_text(encoding="utf-8"))["runs"] == []
    table = pd.read_csv(out / "drawn.csv")
    assert set(table["init"]) == set(CHAIN_INITS)
    assert set(table["rank"]) == {8, 16, 64}
    for wrong in (["--out", str(out)], ["--initialisation", str(tmp_path), "--out", str(out)]):
        refused = CliRunner().invoke(app, wrong)
        assert refused.exit_code == 2
        assert "expected RUNS, or --initialisation alone" in refused.output
    refused = CliRunner().invoke(app, ["--initialisation", "--only", "loss", "--out", str(out)])
    assert "--initialisation with RUNS or --only" in refused.output


def order_runs(num_seeds: int = 2, num_steps: int = 5) -> FrameRuns:
    parts = []
    for method, num_factors in (("lora-16", 2), ("linchain-3-16", 5)):
        for seed in range(num_seeds):
            ratios = [[(0.1 + 0.01 * seed) ** k / step for k in range(num_factors)] for step in range(1, num_steps + 1)]
            table = {
                "step": range(1, num_steps + 1),
                "module": "p",
                "order_ratios": ratios,
                "first_order_share": 1.0,
                "interaction_ratio": 0.1,
                "delta_update_norm": 1.0,
            }
            parts.append(rows(method, seed, table))
    return FrameRuns(modules=pd.concat(parts, ignore_index=True))


def test_orders_are_drawn_by_method() -> None:
    runs = order_runs()
    drawn = plot_orders(runs)
    assert [axes.get_title() for axes in drawn.figure.axes] == ["lora-16", "linchain-3-16"]
    for axes, method, count in zip(drawn.figure.axes, ("lora-16", "linchain-3-16"), (2, 5), strict=True):
        assert axes.get_yscale() == "log"
        own = drawn.table[drawn.table["method"] == method]
        shown = [line for line in axes.lines if len(line.get_xdata())]
        assert len(shown) == count
        for line, (_, curve) in zip(shown, own.groupby("order"), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), curve["mean"])
    # Geometric means over seeds, of what the table of orders has as arithmetic ones.
    table = summarise_orders(runs)
    third = drawn.table[(drawn.table["order"] == 3) & (drawn.table["step"] == 1)]["mean"].item()
    assert third == pytest.approx(0.1 * 0.11)
    mean = table[(table["order"] == 3) & (table["step"] == 1)]["mean"].item()
    assert mean == pytest.approx((0.01 + 0.0121) / 2)
    assert "the unit of replication is the seed" in drawn.caption
    assert [column.name for column in drawn.columns] == ["step", "module", "order_ratios"]


def test_orders_of_runs_at_two_rates_are_refused() -> None:
    frame = order_runs().tables["modules"]
    other = frame.assign(base_learning_rate=1.0, run=frame["run"] + "b")
    with pytest.raises(InputError, match="at one problem and learning rate"):
        plot_orders(FrameRuns(modules=pd.concat([frame, other], ignore_index=True)))


def test_chains_that_are_too_long_are_refused() -> None:
    frame = order_runs().tables["modules"]
    longer = frame.assign(order_ratios=[[1.0] * 9] * len(frame))
    with pytest.raises(InputError, match="at most 7 orders, got 9"):
        plot_orders(FrameRuns(modules=longer))
