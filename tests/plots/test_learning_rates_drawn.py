"""The figure of a sweep over learning rates, tested by the table it returns and by the artists in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from synthetic_runs import FrameRuns, rows

from linchain_analysis.errors import InputError
from linchain_analysis.plots.content import NoValuesError
from linchain_analysis.plots.learning_rates import plot_learning_rates

RATES = (0.125, 0.25, 0.5, 1.0)


def sweep(
    *,
    column: str = "relative_loss",
    ranks: bool = True,
    methods: Sequence[str] = ("lora-8", "linchain-3-8"),
    problem: str = "sums",
) -> FrameRuns:
    """Losses that fall as exp(−rate · step / (1 + n)), with seeds that differ a little; the largest rate diverges."""
    steps, modules = [], []
    step = np.arange(1, 31)
    for place, method in enumerate(methods):
        for rate in RATES:
            for seed in range(3):
                loss = np.exp(-rate * step / (1 + place + 0.1 * seed))
                if rate == RATES[-1]:
                    loss[4:] = math.nan
                steps.append(rows(method, seed, {"step": step, column: loss}, rate=rate, problem=problem))
                spectrum = [[1.0, math.exp(-place - 1 / k)] for k in step]
                modules.append(
                    rows(
                        method, seed, {"step": step, "module": "map", "spectrum": spectrum}, rate=rate, problem=problem
                    )
                )
    tables = {"steps": pd.concat(steps, ignore_index=True)}
    return FrameRuns(**tables, **({"modules": pd.concat(modules, ignore_index=True)} if ranks else {}))


def test_steps_shares_and_final_losses_stand_over_the_rates() -> None:
    drawn = plot_learning_rates(sweep(), level=0.1)  # type: ignore[arg-type]
    over = drawn.table[drawn.table["part"] == "a-c"].set_index(["method", "base_learning_rate"])
    # exp(−s/2 / 1.1) ≤ 0.1 from s = 2.2 ln 10 = 5.07 on: the middle one of three seeds takes 6 steps.
    assert over.loc[("lora-8", 0.5), "median"] == 6
    assert over.loc[("lora-8", 1.0), ["num_reached", "num_diverged", "final_loss"]].tolist() == [0, 3, math.inf]
    assert over.loc[("lora-8", 0.5), "final_loss"] == pytest.approx(math.exp(-15 / 1.1), rel=1e-12)
    steps, share, final = drawn.figure.axes[:3]
    for axes, column in ((steps, "median"), (final, "final_loss")):
        line = next(line for line in axes.get_lines() if line.get_label() == "lora-8")
        values = over.loc["lora-8", column].to_numpy(dtype=float)
        expected = np.where(np.isfinite(values), values, np.nan)
        np.testing.assert_allclose(line.get_ydata(), np.maximum(expected, 1e-6) if column == "final_loss" else expected)
    line = next(line for line in share.get_lines() if line.get_label() == "linchain-3-8")
    reached = over.loc["linchain-3-8", "num_reached"].to_numpy(dtype=float) / 3
    np.testing.assert_allclose(line.get_ydata(), reached)


def test_the_ring_is_at_the_chosen_rate_and_the_caption_says_how_it_was_chosen() -> None:
    drawn = plot_learning_rates(sweep(), level=0.1)  # type: ignore[arg-type]
    chosen = drawn.table[(drawn.table["part"] == "a-c") & (drawn.table["chosen"] == True)]  # noqa: E712
    assert chosen.set_index("method")["base_learning_rate"].to_dict() == {"lora-8": 0.5, "linchain-3-8": 0.5}
    rings = [line for line in drawn.figure.axes[0].get_lines() if line.get_fillstyle() == "none"]
    assert sorted(float(line.get_xdata()[0]) for line in rings) == [0.5, 0.5]
    for words in (
        "The unit of replication is the seed (3 per method and rate)",
        "most seeds",
        "on the seeds that are shown",
        "common rate, 0.5",
    ):
        assert words in drawn.caption


def test_an_optimum_at_the_edge_of_the_grid_is_said() -> None:
    runs = sweep()
    runs.tables = {name: frame[frame["base_learning_rate"] < 1.0] for name, frame in runs.tables.items()}
    caption = plot_learning_rates(runs, level=0.1).caption  # type: ignore[arg-type]
    assert "At the largest rate of the grid, so that a better one may lie outside it: lora-8, linchain-3-8." in caption


def test_curves_are_those_at_the_common_rate_and_at_each_ones_own() -> None:
    table = plot_learning_rates(sweep(), level=0.1).table  # type: ignore[arg-type]
    assert set(table["part"]) == {"a-c", "d", "e", "f", "g"}
    assert set(table.loc[table["part"] == "d", "base_learning_rate"]) == {0.5}
    first = table[(table["part"] == "d") & (table["method"] == "lora-8") & (table["step"] == 2)]
    logs = [-0.5 * 2 / (1 + 0.1 * seed) for seed in range(3)]
    assert first["mean"].tolist() == [pytest.approx(math.exp(np.mean(logs)), rel=1e-12)]


def test_without_spectra_the_ranks_are_left_out() -> None:
    drawn = plot_learning_rates(sweep(ranks=False), level=0.1)  # type: ignore[arg-type]
    assert len(drawn.figure.axes) == 5
    assert set(drawn.table["part"]) == {"a-c", "d", "e"}


def test_a_training_loss_is_smoothed_and_its_level_found() -> None:
    drawn = plot_learning_rates(sweep(column="loss", ranks=False))  # type: ignore[arg-type]
    (quantity,) = drawn.table.loc[drawn.table["part"] == "a-c", "quantity"].unique()
    assert quantity.endswith(" of loss")
    over = drawn.table[(drawn.table["part"] == "a-c")]
    assert (over.groupby("method")["num_reached"].max() >= 2).all()  # the level is one that every method can reach


def test_several_problems_are_refused() -> None:
    both = pd.concat([sweep().tables["steps"], sweep(problem="other").tables["steps"]])
    with pytest.raises(InputError, match="learning-rates: expected runs of one problem"):
        plot_learning_rates(FrameRuns(steps=both))  # type: ignore[arg-type]


def numbers(axes: Axes) -> list[str]:
    low, high = axes.get_ylim()
    labels = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    return [label.get_text() for tick, label in labels if low <= tick <= high]


def overfitting(rate_of_seed: float = 0.05) -> FrameRuns:
    """Losses that fall to 0.8 and then rise to 1.6, as on new inputs where labels are noisy."""
    step = np.arange(1, 31)
    loss = np.where(step <= 10, 1 - 0.02 * step, 0.8 + 0.04 * (step - 10))
    parts = [
        rows(method, seed, {"step": step, "relative_loss": loss + rate_of_seed * seed * rate}, rate=rate)
        for method in ("lora-8", "linchain-3-8")
        for rate in RATES
        for seed in range(3)
    ]
    return FrameRuns(steps=pd.concat(parts, ignore_index=True))


def test_a_loss_that_rises_again_has_a_level_and_axes_that_can_be_read() -> None:
    drawn = plot_learning_rates(overfitting())  # type: ignore[arg-type]
    drawn.figure.canvas.draw()
    over = drawn.table[drawn.table["part"] == "a-c"]
    assert set(over["quantity"]) == {"steps to 0.81 of relative_loss"}  # 0.8 + 0.05 · 0.125 of the middle seed
    assert over["median"].min() == 10
    for axes in (drawn.figure.axes[0], drawn.figure.axes[2], *drawn.figure.axes[3:5]):
        assert 2 <= len(numbers(axes)) <= 7
        assert all(numbers(axes))


def test_a_level_that_no_rate_reaches_is_said() -> None:
    drawn = plot_learning_rates(overfitting(), level=0.1)  # type: ignore[arg-type]
    drawn.figure.canvas.draw()
    assert [text.get_text() for text in drawn.figure.axes[0].texts] == ["at no rate by most seeds", "a"]
    assert numbers(drawn.figure.axes[0]) == []


def test_a_loss_of_nothing_is_refused_as_what_it_is() -> None:
    runs = overfitting()
    runs.tables["steps"]["relative_loss"] = 0.0
    with pytest.raises(
        NoValuesError, match=r"learning-rates: expected a loss above 0 .*, got relative loss 0 throughout"
    ):
        plot_learning_rates(runs)  # type: ignore[arg-type]


def test_chains_of_one_length_are_told_apart_by_the_marker_of_their_init() -> None:
    methods = ("linchain-3-8", "linchain-3-8-orthogonal")
    drawn = plot_learning_rates(sweep(methods=methods), level=0.1)  # type: ignore[arg-type]
    for axes in drawn.figure.axes:
        lines = {line.get_label(): line for line in axes.get_lines() if line.get_label() in methods}
        plain, other = (lines[method] for method in methods)
        assert plain.get_color() == other.get_color()
        assert other.get_marker() == "s" and plain.get_marker() in ("o", "None")
        assert other.get_markerfacecolor() == "white"
    (legend,) = drawn.figure.legends
    assert [handle.get_marker() for handle in legend.legend_handles] == ["None", "s"]  # type: ignore[union-attr]


def test_the_definition_of_the_loss_stands_beside_the_figure() -> None:
    columns = plot_learning_rates(sweep(), level=0.1).columns  # type: ignore[arg-type]
    assert [column.name for column in columns] == ["step", "relative_loss", "spectrum", "effective_rank"]
