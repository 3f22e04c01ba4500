"""What the figures show is tested by the table they return and by the artists in them, not by pixels."""

import math
import re
import zlib
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from synthetic_runs import FACTORS, FrameRuns, comparison, rows

from linchain_analysis.errors import InputError
from linchain_analysis.plots import (
    plot_effective_rank,
    plot_gradient_norms,
    plot_loss,
    plot_overview,
    plot_update_norms,
)
from linchain_analysis.plots.content import NoValuesError

# Quantile 0.975 of the t distribution with 2 degrees of freedom, in closed form.
T2 = (2 * 0.975 - 1) / math.sqrt(2 * 0.975 * 0.025)
SINGLE = (plot_loss, plot_effective_rank, plot_gradient_norms, plot_update_norms)


def _losses(values: dict[str, list[list[float]]]) -> FrameRuns:
    frames = [
        rows(method, seed, {"step": range(1, len(run) + 1), "loss": run})
        for method, seeds in values.items()
        for seed, run in enumerate(seeds)
    ]
    return FrameRuns(steps=pd.concat(frames, ignore_index=True))


def _axes(figure: Figure | SubFigure) -> list[Axes]:
    return [*figure.axes] if isinstance(figure, Figure) else []


def _looks(figure: Figure) -> dict[str, set[tuple[str, str]]]:
    looks: dict[str, set[tuple[str, str]]] = {}
    for axes in _axes(figure):
        for line in axes.get_lines():
            looks.setdefault(str(line.get_label()), set()).add(
                (str(line.get_color()), str(line._unscaled_dash_pattern))
            )  # type: ignore[attr-defined]
    return looks


def test_the_table_holds_mean_and_interval_by_hand() -> None:
    drawn = plot_loss(_losses({"lora-16": [[1.0, 4.0], [2.0, 5.0], [3.0, 9.0]]}))
    table = drawn.table.set_index("step")
    assert list(table["mean"]) == [2.0, 6.0]
    assert table.loc[1, "high"] == pytest.approx(2 + T2 / math.sqrt(3), rel=1e-12)
    assert table.loc[2, "low"] == pytest.approx(6 - T2 * math.sqrt(7) / math.sqrt(3), rel=1e-12)  # s² = (4 + 1 + 9)/2


def test_lines_and_bands_are_those_of_the_table() -> None:
    drawn = plot_gradient_norms(comparison(num_steps=30))
    for axes, factor in zip(_axes(drawn.figure), ["A", "W1", "W2", "W3", "B"], strict=False):
        panel = drawn.table[drawn.table["panel"] == factor]
        assert [line.get_label() for line in axes.get_lines()] == list(FACTORS) if factor in "AB" else True
        for line in axes.get_lines():
            curve = panel[panel["method"] == line.get_label()]
            np.testing.assert_array_equal(line.get_xdata(), curve["step"])
            np.testing.assert_array_equal(line.get_ydata(), curve["mean"])
        bands = [artist for artist in axes.collections if isinstance(artist, FillBetweenPolyCollection)]
        assert len(bands) == panel["method"].nunique()
        tops = [path.vertices[:, 1].max() for band in bands for path in band.get_paths()[:1]]
        assert max(tops) == panel["high"].max()


def test_gradients_are_averaged_over_modules_then_geometrically_over_seeds() -> None:
    def factors(seed: int, values: list[float]) -> pd.DataFrame:
        return rows("lora-16", seed, {"step": 1, "module": ["p", "q"], "factor": "A", "grad_norm": values})

    runs = FrameRuns(factors=pd.concat([factors(0, [1.0, 3.0]), factors(1, [8.0, 8.0])], ignore_index=True))
    (row,) = plot_gradient_norms(runs).table.itertuples()
    assert (row.panel, row.mean) == ("A", pytest.approx(4.0, rel=1e-12))  # √(2 · 8)


def test_three_ranks_stand_side_by_side() -> None:
    modules = rows("lora-16", 0, {"step": [1, 2], "module": "p", "spectrum": [[1.0, 1.0], [3.0, 1.0]]})
    drawn = plot_effective_rank(FrameRuns(modules=modules))
    found = drawn.table[drawn.table["step"] == 2].set_index("panel")["mean"]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    squared = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert found["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-12)
    assert found["effective_rank_squared"] == pytest.approx(math.exp(squared), rel=1e-12)
    assert found["stable_rank"] == pytest.approx(10 / 9, rel=1e-12)


def test_one_colour_and_one_line_style_for_each_method_in_every_figure() -> None:
    runs = comparison(num_seeds=2, num_steps=10)
    found: dict[str, set[tuple[str, str]]] = {}
    for plot in (*SINGLE, plot_overview):
        for method, looks in _looks(plot(runs).figure).items():
            found.setdefault(method, set()).update(looks)
    assert set(found) == set(FACTORS)
    assert all(len(looks) == 1 for looks in found.values())
    assert len({next(iter(looks))[0] for looks in found.values()}) == 4
    assert len({next(iter(looks))[1] for looks in found.values()}) == 4


def test_the_legend_names_every_method_once() -> None:
    for plot in (*SINGLE, plot_overview):
        (legend,) = plot(comparison(num_seeds=2, num_steps=5)).figure.legends
        assert [text.get_text() for text in legend.get_texts()] == list(FACTORS)
        assert all(isinstance(handle, Line2D) for handle in legend.legend_handles)


def test_captions_state_unit_interval_smoothing_and_gauge() -> None:
    runs = comparison(num_steps=40)
    loss, rank, gradient = (plot(runs) for plot in (plot_loss, plot_effective_rank, plot_gradient_norms))
    for drawn in (loss, rank, gradient):
        assert "(3 per method)" in drawn.caption
        assert "95 % t interval" in drawn.caption
        assert "the unit of replication is the seed" in drawn.caption
    assert "mean of its last 2 recorded values" in loss.caption
    assert "last" not in rank.caption
    assert "depend on the gauge" in gradient.caption
    assert "geometric mean over seeds" in gradient.caption
    assert _axes(loss.figure)[0].get_ylabel() == "training loss (nats)"
    assert _axes(gradient.figure)[0].get_ylabel() == "gradient norm\n(nats/weight)"
    assert {column.name for column in gradient.columns} == {"step", "module", "factor", "grad_norm"}


def test_the_overview_joins_the_four_tables() -> None:
    runs = comparison(num_seeds=2, num_steps=6)
    drawn = plot_overview(runs)
    for letter, plot in zip("abcd", SINGLE, strict=True):
        part = drawn.table[drawn.table["part"] == letter].drop(columns="part").reset_index(drop=True)
        pd.testing.assert_frame_equal(part, plot(runs).table)
    assert drawn.caption.count("the unit of replication is the seed") == 2  # once for each kind of interval


def test_the_overview_leaves_out_what_was_not_recorded() -> None:
    whole = comparison(num_seeds=2, num_steps=6)
    light = FrameRuns(steps=whole.tables["steps"], factors=whole.tables["factors"])
    assert set(plot_overview(light).table["quantity"]) == {"loss", "grad_norm", "update_norm"}
    with pytest.raises(InputError, match=r"effective-rank: expected finite values .* preset `standard`"):
        plot_effective_rank(light)
    with pytest.raises(InputError, match="loss: expected finite values"):
        plot_overview(FrameRuns())


@pytest.mark.parametrize("plot", SINGLE)
@pytest.mark.parametrize(("num_seeds", "num_steps", "every"), [(1, 1, 1), (1, 7, 3), (2, 1, 1), (3, 5, 2)])
def test_small_comparisons_are_drawn(plot: object, num_seeds: int, num_steps: int, every: int) -> None:
    assert callable(plot)
    drawn = plot(comparison(num_seeds, num_steps, every))
    assert drawn.render("png").startswith(b"\x89PNG")
    assert ("no band" in drawn.caption) == (num_seeds == 1)


def test_one_step_of_gradients_shows_b_alone() -> None:
    drawn = plot_gradient_norms(comparison(3, 1))
    positive = drawn.table[drawn.table["mean"] > 0]
    assert set(positive["panel"]) == {"B"}
    low, high = _axes(drawn.figure)[0].get_ylim()
    assert 0 < low < positive["mean"].min() <= positive["mean"].max() < high


def test_a_single_step_is_a_visible_dot() -> None:
    (line,) = _axes(plot_loss(_losses({"lora-16": [[1.0]]})).figure)[0].get_lines()
    assert line.get_marker() == "o"


def test_a_diverged_run_leaves_a_gap_and_a_sentence() -> None:
    drawn = plot_loss(_losses({"lora-16": [[1.0, 2.0, 3.0], [1.0, np.nan, np.inf]], "moslora-16": [[1.0, 2.0, 3.0]]}))
    (own,) = (line for line in _axes(drawn.figure)[0].get_lines() if line.get_label() == "lora-16")
    np.testing.assert_array_equal(own.get_ydata(), [1.0, np.nan, np.nan])
    assert "lora-16: NaN or Inf in 1 of 2 runs, from step 2" in drawn.caption
    assert "(lora-16: 2, moslora-16: 1)" in drawn.caption


def test_no_finite_loss_is_refused() -> None:
    with pytest.raises(InputError, match="loss: expected finite values"):
        plot_loss(_losses({"lora-16": [[np.nan, np.inf]]}))


def test_runs_of_different_lengths_are_drawn_to_the_shortest() -> None:
    drawn = plot_loss(_losses({"lora-16": [[1.0, 1.0], [1.0, 1.0, 1.0]], "moslora-16": [[1.0, 1.0, 1.0]]}))
    assert drawn.table.groupby("method")["step"].max().to_dict() == {"lora-16": 2, "moslora-16": 3}
    assert "drawn up to step 2" in drawn.caption


def test_losses_that_fall_far_get_a_logarithmic_axis() -> None:
    assert _axes(plot_loss(_losses({"lora-16": [[1.0, 6.0]]})).figure)[0].get_yscale() == "log"
    assert _axes(plot_loss(_losses({"lora-16": [[1.0, 4.0]]})).figure)[0].get_yscale() == "linear"
    assert _axes(plot_loss(_losses({"lora-16": [[-1.0, 60.0]]})).figure)[0].get_yscale() == "linear"


def test_a_loss_on_a_logarithmic_axis_has_the_interval_of_its_logarithm() -> None:
    drawn = plot_loss(_losses({"lora-16": [[9.0, 1.0, 0.5], [11.0, 1.0, 1.5]]}))
    (axes,) = _axes(drawn.figure)
    (band,) = axes.collections
    assert axes.get_yscale() == "log"
    assert len(band.get_paths()) == 1
    last = drawn.table.iloc[-1]
    # Two seeds: the mean of two logarithms, and t(0.975, 1 degree of freedom) = 12.706 times half their distance.
    centre, half = np.log([0.5, 1.5]).mean(), 12.7062 * np.log(1.5 / 0.5) / 2
    np.testing.assert_allclose(
        np.log(last[["low", "mean", "high"]].astype(float)), centre + half * np.array([-1, 0, 1]), rtol=1e-5
    )
    assert 0 < last["low"] < axes.get_ylim()[0] < 1.0
    assert "cut at the panel's edge" in drawn.caption
    assert "geometric mean" in drawn.caption


def test_a_wide_band_is_cut_rather_than_the_curves_flattened_and_the_caption_says_so() -> None:
    drawn = plot_loss(_losses({"lora-16": [[0.0, 1.0], [1.0, 2.0]]}))  # means 0.5, 1.5; half width 6.35
    low, high = _axes(drawn.figure)[0].get_ylim()
    assert drawn.table["low"].min() < low < 0.5
    assert 1.5 < high < drawn.table["high"].max()
    assert "cut at the panel's edge" in drawn.caption


def test_two_learning_rates_of_one_method_are_refused() -> None:
    frames = [rows("lora-16", 0, {"step": [1], "loss": [1.0]}, rate=rate) for rate in (1e-3, 1e-2)]
    with pytest.raises(InputError, match=r"lora-16 at one problem .* sums at 0\.001, sums at 0\.01"):
        plot_loss(FrameRuns(steps=pd.concat(frames, ignore_index=True)))


def test_deep_chains_stand_in_several_rows_of_panels() -> None:
    names = ["A", *(f"W{k}" for k in range(1, 11)), "B"]
    frame = rows("linchain-10-4", 0, {"step": 1, "module": "p", "factor": names, "update_norm": 1.0})
    drawn = plot_update_norms(FrameRuns(factors=frame))
    titles = [axes.get_title() for axes in _axes(drawn.figure) if axes.get_visible()]
    assert titles == ["$A$", *(f"$W_{{{k}}}$" for k in range(1, 11)), "$B$"]


def test_fonts_in_the_pdf_are_type_42() -> None:
    pdf = plot_overview(comparison(num_seeds=2, num_steps=6)).render("pdf")
    # A TrueType font program (type 42) is a FontFile2; Type 3 fonts are refused by submission systems.
    streams = [
        zlib.decompress(s) for s in re.findall(rb"/FlateDecode.*?stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL)
    ]
    whole = pdf + b"".join(streams)
    assert whole.count(b"/FontFile2") >= 2
    assert not re.search(rb"/Subtype\s*/Type3", whole)
    assert b"/BaseFont" in whole
    assert b"DejaVu" not in whole


def test_drawing_leaves_no_global_state() -> None:
    before = dict(plt.rcParams)
    plot_overview(comparison(num_seeds=2, num_steps=4)).render("pdf")
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before


def test_what_is_drawn_does_not_follow_the_users_settings() -> None:
    runs = comparison(num_seeds=2, num_steps=4)
    plain = plot_loss(runs).render("pdf")
    with plt.rc_context({"font.size": 30, "lines.linewidth": 9, "pdf.fonttype": 3, "text.color": "red"}):
        assert plot_loss(runs).render("pdf") == plain


def test_jupyter_shows_the_figure() -> None:
    assert plot_loss(_losses({"lora-16": [[1.0, 2.0]]}))._repr_png_().startswith(b"\x89PNG")


def test_axes_follow_the_unit_of_the_loss() -> None:
    runs = comparison()
    assert plot_loss(runs).figure.axes[0].get_ylabel() == "training loss (nats)"  # type: ignore[arg-type]
    for unit, loss, norm in (
        ("1", "training loss", "gradient norm\n(1/weight)"),
        ("K²", "training loss (K²)", "gradient norm\n(K²/weight)"),
    ):
        runs.runs = (SimpleNamespace(manifest=SimpleNamespace(extra={"loss_unit": unit})),)
        drawn = plot_loss(runs)  # type: ignore[arg-type]
        assert drawn.figure.axes[0].get_ylabel() == loss
        assert [column.unit for column in drawn.columns if column.name == "loss"] == [unit]
        norms = plot_gradient_norms(runs)  # type: ignore[arg-type]
        assert norms.figure.axes[0].get_ylabel() == norm
        assert plot_update_norms(runs).figure.axes[0].get_ylabel() == "update norm\n(weight)"  # type: ignore[arg-type]


def test_a_change_of_weight_that_stays_zero_has_no_rank() -> None:
    runs = comparison(num_seeds=1, num_steps=4)
    modules, factors = runs.tables["modules"], runs.tables["factors"]
    modules["spectrum"] = [[0.0, 0.0]] * len(modules)
    with pytest.raises(NoValuesError, match=r"effective-rank: .*got ΔW = 0 throughout, which has no rank"):
        plot_effective_rank(runs)  # type: ignore[arg-type]
    modules["spectrum"] = None
    with pytest.raises(NoValuesError, match="since `light` stores no spectra"):
        plot_effective_rank(runs)  # type: ignore[arg-type]
    factors["update_norm"] = 0.0
    with pytest.raises(NoValuesError, match=r"update-norms: expected norms above 0 .*, got 0 throughout"):
        plot_update_norms(runs)  # type: ignore[arg-type]
