"""Figures of what measures recorded: which there are, what they show, and what they say about gaps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from linchain_analysis.errors import InputError
from linchain_analysis.plots.columns import list_drawables, refuse_unknown
from linchain_analysis.plots.gallery import FIGURES, draw_gallery, find_figures
from linchain_analysis.plots.measures import MAX_ENTRIES, choose_scale, plot_measure
from linchain_analysis.runs import Manifest, ModuleRecord, RunSet, RunWriter, load_runs
from linchain_analysis.vocabulary import Column

MODULES = ("layers.0.q_proj", "layers.1.q_proj")
T1 = math.tan(0.475 * math.pi)  # quantile 0.975 of the t distribution with 1 degree of freedom


def write(
    folder: Path,
    tables: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    *,
    method: str = "lora-2",
    seed: int = 0,
    factors: Sequence[str] = ("A", "B"),
) -> None:
    """Write one run; a table whose columns lack `module` is that of every module in turn, where it has modules."""
    shapes = tuple((name, (4, 4)) for name in factors)
    manifest = Manifest(
        command=("train",),
        method=method,
        problem="sums",
        base_learning_rate=1e-3,
        init_seed=seed,
        data_seed=seed,
        modules=tuple(ModuleRecord(name, "q_proj", 0, "default", 4, 4, 1.0, shapes) for name in MODULES),
        columns=dict(columns or {}),
    )
    writer = RunWriter(folder / f"{method}-seed{seed}", manifest)
    steps = sorted({step for table in tables.values() for step in np.atleast_1d(table["step"]).tolist()})
    if "steps" not in tables:
        writer.append("steps", {"step": steps, "loss": [1.0] * len(steps)})
    for name, table in tables.items():
        writer.append(name, pd.DataFrame(dict(table)).to_dict("list"))
    writer.close()


def write_modules(
    folder: Path, values: Sequence[Sequence[float]], name: str = "own", *, steps: Sequence[int] = (), **options: Any
) -> None:
    """Write a run whose modules have `values` (module, step) in a column that only the run knows."""
    steps = steps or range(1, len(values[0]) + 1)
    table = {
        "step": [step for _ in values for step in steps],
        "module": [module for module, _ in zip(MODULES, values, strict=False) for _ in steps],
        name: [value for own in values for value in own],
    }
    tables = {"modules": table, **options.pop("tables", {})}
    write(folder, tables, {"modules": [(name, "float")]}, **options)


def runs_in(folder: Path) -> RunSet:
    return load_runs(folder)


def test_modules_are_averaged_and_then_seeds_with_an_interval_by_hand(tmp_path: Path) -> None:
    write_modules(tmp_path, [[0.1, 0.2], [0.3, 0.4]])
    write_modules(tmp_path, [[0.4, 0.5], [0.6, 0.7]], seed=1)
    drawn = plot_measure(runs_in(tmp_path), "own")
    # Stored as float32. Means of the runs 0.2 and 0.5, then 0.3 and 0.6: s/√2 is half their distance.
    np.testing.assert_allclose(drawn.table["mean"], [0.35, 0.45], rtol=1e-6)
    np.testing.assert_allclose(drawn.table["high"] - drawn.table["mean"], [T1 * 0.15] * 2, rtol=1e-6)
    assert list(drawn.table["quantity"].unique()) == ["own"]
    assert drawn.figure.axes[0].get_yscale() == "linear"


def test_a_size_over_decades_is_a_geometric_mean_on_a_logarithmic_axis(tmp_path: Path) -> None:
    write_modules(tmp_path, [[1.0, 100.0]])
    write_modules(tmp_path, [[4.0, 10000.0]], seed=1)
    drawn = plot_measure(runs_in(tmp_path), "own")
    np.testing.assert_allclose(drawn.table["mean"], [2.0, 1000.0], rtol=1e-6)
    assert drawn.figure.axes[0].get_yscale() == "log"
    assert "geometric mean over seeds" in drawn.caption


@pytest.mark.parametrize(
    ("unit", "kind", "values", "means", "scale"),
    [
        ("weight", "float", [0.01, 1.0], [0.01, 1.0], "log"),
        ("weight", "float", [0.2, 1.0], [0.2, 1.0], "linear"),  # less than a decade
        ("weight", "float", [-0.01, 1.0], [0.01, 1.0], "linear"),  # one negative value, hidden in a mean
        ("1", "float", [1.0, 1e6], [1.0, 1e6], "log"),  # a condition number
        ("1", "float", [1e-4, 1.1], [1e-4, 1.1], "linear"),  # a share
        ("1", "values", [1e-4, 1.0], [1e-4, 1.0], "log"),
        ("directions", "float", [1.0, 64.0], [1.0, 64.0], "linear"),
        ("weight", "float", [0.0, 0.01, 1.0], [0.0, 0.01, 1.0], "log"),
        ("weight", "float", [0.0, 0.0], [0.0, 0.0], "linear"),
        ("weight", "float", [1.0, np.inf], [1.0, np.nan], "linear"),
    ],
)
def test_the_scale_follows_unit_and_values(
    unit: str, kind: Any, values: list[float], means: list[float], scale: str
) -> None:
    column = Column("modules", "own", kind, unit, "", "")
    assert choose_scale(column, pd.Series(values), pd.Series(means)) == scale


def test_factors_and_links_have_one_panel_each_from_input_to_output(tmp_path: Path) -> None:
    chain = ["A", *(f"W{depth}" for depth in range(1, 12)), "B"]
    links = [f"{left}-{right}" for left, right in pairwise(chain)]
    columns = {"factors": [("condition", "float")], "links": [("imbalance", "float")]}
    for method, factors, pairs in (("linchain-11-2", chain, links), ("lora-2", ["A", "B"], ["A-B"])):
        tables = {
            "factors": {"step": 1, "module": MODULES[0], "factor": factors[::-1], "condition": 2.0},
            "links": {"step": 1, "module": MODULES[0], "link": pairs[::-1], "imbalance": 0.5},
        }
        write(tmp_path, tables, columns, method=method, factors=factors)
    runs = runs_in(tmp_path)
    titles = {
        name: [axes.get_title() for axes in plot_measure(runs, name).figure.axes if axes.get_visible()]
        for name in ("condition", "imbalance")
    }
    assert titles["condition"] == ["$A$", *(f"$W_{{{depth}}}$" for depth in range(1, 12)), "$B$"]
    assert titles["imbalance"][:3] == ["$A$ – $W_{1}$", "$A$ – $B$", "$W_{1}$ – $W_{2}$"]
    assert titles["imbalance"][-2:] == ["$W_{10}$ – $W_{11}$", "$W_{11}$ – $B$"]


def test_sampled_columns_are_drawn_where_they_are_known(tmp_path: Path) -> None:
    gap = [np.nan] * 2
    write_modules(tmp_path, [[0.5, *gap, 0.25, *gap]])
    drawn = plot_measure(runs_in(tmp_path), "own")
    assert drawn.table[["step", "mean"]].to_numpy().tolist() == [[1, 0.5], [4, 0.25]]
    (line,) = drawn.figure.axes[0].get_lines()
    assert list(line.get_ydata()) == [0.5, 0.25]
    assert "It is known at 2 of 6 recorded steps" in drawn.caption
    assert "NaN or Inf" not in drawn.caption
    assert "ends" not in drawn.caption


@pytest.mark.parametrize(("num_known", "marker"), [(2, "o"), (25, "o"), (26, "None")])
def test_few_known_steps_are_marked(num_known: int, marker: str, tmp_path: Path) -> None:
    steps = range(1, 2 * num_known + 1)
    write_modules(tmp_path, [[step / 10 if step % 2 else np.nan for step in steps]], steps=steps)
    (line,) = plot_measure(runs_in(tmp_path), "own").figure.axes[0].get_lines()
    assert len(line.get_xdata()) == num_known  # type: ignore[arg-type]
    assert line.get_marker() == marker


def test_a_module_where_it_is_undefined_is_left_out_and_the_caption_says_so(tmp_path: Path) -> None:
    write_modules(tmp_path, [[0.5, 0.5], [np.nan, 0.1]])
    drawn = plot_measure(runs_in(tmp_path), "own")
    np.testing.assert_allclose(drawn.table["mean"], [0.5, 0.3], rtol=1e-6)
    assert "Modules in which it is undefined at a step are left out" in drawn.caption


def test_a_module_that_diverged_is_not_left_out(tmp_path: Path) -> None:
    norms = {
        "step": [1, 2, 3] * 2,
        "module": [module for module in MODULES for _ in range(3)],
        "factor": "A",
        "weight_norm": [1.0, np.nan, np.nan, 1.0, 1.0, 1.0],
    }
    write_modules(tmp_path, [[0.5, np.nan, np.nan], [0.1, 0.1, 0.1]], tables={"factors": norms})
    drawn = plot_measure(runs_in(tmp_path), "own")
    np.testing.assert_allclose(drawn.table["mean"], [0.3, np.nan, np.nan], rtol=1e-6)
    assert "lora-2: NaN or Inf in 1 of 1 runs, from step 2" in drawn.caption
    assert "left out" not in drawn.caption


def test_infinity_breaks_the_curve(tmp_path: Path) -> None:
    write_modules(tmp_path, [[3.0, np.inf, 5.0], [1.0, 1.0, 1.0]])
    drawn = plot_measure(runs_in(tmp_path), "own")
    np.testing.assert_array_equal(drawn.table["mean"], [2.0, np.nan, 3.0])
    assert "NaN or Inf in 1 of 1 runs, from step 2" in drawn.caption


def test_runs_that_know_different_steps_are_interpolated_and_the_caption_says_so(tmp_path: Path) -> None:
    write_modules(tmp_path, [[0.0, np.nan, 0.5, 0.5]])
    write_modules(tmp_path, [[0.5, 0.5, 0.5, np.nan]], seed=1)
    drawn = plot_measure(runs_in(tmp_path), "own")
    np.testing.assert_allclose(drawn.table["mean"], [0.25, 0.375, 0.5], rtol=1e-6)
    assert "A run is interpolated linearly between its known steps" in drawn.caption
    assert "lora-2 is drawn at steps 1 to 3, within which every run of it has values." in drawn.caption


def test_runs_that_never_know_it_together_are_named(tmp_path: Path) -> None:
    write_modules(tmp_path, [[0.5, np.nan]])
    write_modules(tmp_path, [[np.nan, 0.5]], seed=1)
    write_modules(tmp_path, [[0.5, 0.5]], method="moslora-2")
    drawn = plot_measure(runs_in(tmp_path), "own")
    assert set(drawn.table["method"]) == {"moslora-2"}
    assert "lora-2 is not drawn: there is no step at which every run of it has values." in drawn.caption


def test_runs_without_the_column_are_named_and_the_others_drawn(tmp_path: Path) -> None:
    write_modules(tmp_path, [[0.5]])
    for seed in range(4):
        write_modules(tmp_path, [[0.5]], name="other", method="moslora-2", seed=seed)
    drawn = plot_measure(runs_in(tmp_path), "own")
    assert set(drawn.table["method"]) == {"lora-2"}
    assert "Not recorded by moslora-2-seed0, moslora-2-seed1, moslora-2-seed2 and 1 more." in drawn.caption


def test_a_measure_that_cannot_be_imported_is_labelled_by_its_name(tmp_path: Path) -> None:
    write_modules(tmp_path, [[2.0, 3.0]], name="my_own$quantity")
    drawn = draw_gallery(runs_in(tmp_path)).figures["my-own-quantity"]
    assert drawn.figure.axes[0].get_ylabel() == r"my own\$quantity"
    assert drawn.caption.startswith("my_own$quantity, mean over modules: a measure whose definition")
    assert [column.name for column in drawn.columns] == ["step", "module", "my_own$quantity"]
    assert drawn.render("png").startswith(b"\x89PNG")


def test_known_columns_carry_unit_meaning_and_gauge(tmp_path: Path) -> None:
    factors = {"step": [1, 2], "module": MODULES[0], "factor": "A", "condition": [1.0, 100.0]}
    modules = {"step": [1, 2], "module": MODULES[0], "full_grad_norm": 0.5, "interaction_ratio": 0.5}
    columns = {
        "factors": [("condition", "float")],
        "modules": [("full_grad_norm", "float"), ("interaction_ratio", "float")],
    }
    write(tmp_path, {"factors": factors, "modules": modules}, columns)
    figures = draw_gallery(runs_in(tmp_path)).figures
    assert "It depends on the gauge" in figures["condition"].caption
    assert "σ₁/σ_min of F_i" in figures["condition"].caption
    assert "gauge" not in figures["interaction-ratio"].caption
    assert figures["full-grad-norm"].figure.axes[0].get_ylabel() == "full grad norm (nats/weight)"


def test_lists_have_one_panel_for_each_entry(tmp_path: Path) -> None:
    lists = {"step": [1, 2], "module": MODULES[0], "order_ratios": [[1.0, 0.01], [1.0, 0.02]]}
    longer = {"step": [1, 2], "module": MODULES[0], "order_ratios": [[1.0, 0.04, 0.1], None]}
    columns = {"modules": [("order_ratios", "values")]}
    write(tmp_path, {"modules": lists}, columns)
    write(tmp_path, {"modules": longer}, columns, method="moslora-2")
    drawn = plot_measure(runs_in(tmp_path), "order_ratios")
    found = drawn.table.set_index(["panel", "method", "step"])["mean"]
    assert [axes.get_title() for axes in drawn.figure.axes] == ["order 1", "order 2", "order 3"]
    assert found["2", "lora-2", 2] == pytest.approx(0.02, rel=1e-6)  # stored as float32
    assert found["3", "moslora-2", 1] == pytest.approx(0.1, rel=1e-6)
    assert len(found) == 7


def test_lists_of_factors_have_a_panel_for_each_factor_and_entry(tmp_path: Path) -> None:
    factors = {"step": 1, "module": MODULES[0], "factor": ["B", "A"], "own": [[3.0, 4.0], [1.0, 2.0]]}
    write(tmp_path, {"factors": factors}, {"factors": [("own", "values")]})
    drawn = plot_measure(runs_in(tmp_path), "own")
    assert [axes.get_title() for axes in drawn.figure.axes] == [
        *("$A$, entry 1", "$A$, entry 2"),
        *("$B$, entry 1", "$B$, entry 2"),
    ]
    assert drawn.table.set_index("panel")["mean"].to_dict() == {"A 1": 1.0, "A 2": 2.0, "B 1": 3.0, "B 2": 4.0}


def test_spectra_and_long_lists_are_left_out_with_a_reason(tmp_path: Path) -> None:
    modules = {"step": 1, "module": MODULES, "own_spectrum": [[1.0]] * 2, "own_list": [[1.0] * (MAX_ENTRIES + 1)] * 2}
    write(tmp_path, {"modules": modules}, {"modules": [("own_spectrum", "spectrum"), ("own_list", "values")]})
    gallery = draw_gallery(runs_in(tmp_path))
    assert not {"own-spectrum", "own-list"} & set(gallery.figures)
    reasons = [str(reason) for reason in gallery.left_out]
    assert any(reason.startswith("own-spectrum: expected single values") for reason in reasons)
    assert any(f"got lists of {MAX_ENTRIES + 1}" in reason for reason in reasons)


def test_what_was_never_known_is_left_out_with_what_it_means(tmp_path: Path) -> None:
    steps = {"step": [1, 2], "loss": 1.0, "noise_scale": np.nan}
    write(tmp_path, {"steps": steps}, {"steps": [("noise_scale", "float")]})
    gallery = draw_gallery(runs_in(tmp_path))
    (reason,) = (reason for reason in gallery.left_out if reason.place == "noise-scale")
    assert "got none; see when it is known: tr Σ/|G|²" in str(reason)


def test_by_default_what_measures_recorded_is_drawn_and_no_more(tmp_path: Path) -> None:
    modules = {"step": [1, 2], "module": MODULES[0], "spectrum": [[3.0, 1.0]] * 2, "own": 0.5}
    links = {"step": [1, 2], "module": MODULES[0], "link": "A-B", "balance_drift": [0.0, 0.1]}
    steps = {"step": [1, 2], "loss": 1.0, "own_of_steps": [0.1, 0.2]}
    write(
        tmp_path,
        {"steps": steps, "modules": modules, "links": links},
        {"modules": [("own", "float")], "steps": [("own_of_steps", "float")]},
    )
    assert set(draw_gallery(runs_in(tmp_path)).figures) - set(FIGURES) == {"own-of-steps", "own", "balance-drift"}


def test_a_run_without_measures_has_no_other_figures(tmp_path: Path) -> None:
    write(tmp_path, {"modules": {"step": 1, "module": MODULES[0], "spectrum": [[1.0]]}})
    assert set(draw_gallery(runs_in(tmp_path)).figures) == {"overview", "loss", "effective-rank"}


def test_columns_computed_on_reading_are_drawn_when_they_are_named(tmp_path: Path) -> None:
    modules = {"step": [1, 2], "module": MODULES[0], "spectrum": [[0.0, 0.0], [2.0, 1.0]]}
    write(tmp_path, {"modules": modules})
    runs = runs_in(tmp_path)
    names = find_figures(runs, ["participation_ratio", "num-directions", "stable-rank", "grad-norm"])
    gallery = draw_gallery(runs, names)
    (row,) = gallery.figures["participation-ratio"].table.itertuples()  # delta = 0 has none
    assert (row.step, row.mean) == (2, pytest.approx(25 / 17, rel=1e-12))
    assert list(gallery.figures) == ["participation-ratio", "num-directions", "stable-rank"]
    assert gallery.left_out[0].place == "grad-norm"


def test_names_never_meet(tmp_path: Path) -> None:
    columns = [("loss", "float"), ("Overview", "float"), ("../a b", "float"), ("a b", "float"), ("..", "float")]
    modules = {"step": 1, "module": MODULES, **{name: 0.5 for name, _ in columns}, "own": 0.25}
    factors = {"step": 1, "module": MODULES, "factor": "A", "own": 0.75}
    write(
        tmp_path,
        {"modules": modules, "factors": factors},
        {"modules": [*columns, ("own", "float")], "factors": [("own", "float")]},
    )
    figures = draw_gallery(runs_in(tmp_path)).figures
    assert set(figures) - set(FIGURES) == {
        *("modules-loss", "modules-Overview", "a-b", "modules-a-b", "unnamed", "own", "factors-own"),
    }
    assert figures["factors-own"].table["mean"].tolist() == [0.75]


def test_what_the_loop_logged_is_drawn_when_it_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"steps": {"step": [1, 2], "loss": 1.0}})
    writer = RunWriter(tmp_path / "other", Manifest(command=("train",), method="moslora-2", init_seed=0, data_seed=0))
    writer.append("steps", {"step": [1, 2], "loss": [1.0, 1.0]})
    writer.append("scalars", {"step": [1, 2], "name": ["accuracy"] * 2, "value": [0.25, 0.5]})
    writer.close()
    runs = runs_in(tmp_path)
    assert "accuracy" not in draw_gallery(runs).figures
    assert plot_measure(runs, "accuracy").table["mean"].tolist() == [0.25, 0.5]


def test_unknown_names_are_refused_with_all_that_is_possible(tmp_path: Path) -> None:
    modules = {"step": 1, "module": MODULES, "own": 0.5, "own_spectrum": [[1.0]] * 2}
    write(tmp_path, {"modules": modules}, {"modules": [("own", "float"), ("own_spectrum", "spectrum")]})
    runs = runs_in(tmp_path)
    with pytest.raises(InputError, match=r"--only: expected names among overview, .*own, .*got 'owm'; did you mean"):
        find_figures(runs, ["loss", "owm"], "--only")
    with pytest.raises(InputError, match=r"got 'first-order-share', which these runs did not record; record it, by"):
        find_figures(runs, ["first_order_share"])
    with pytest.raises(InputError, match="plot_measure: expected names among own"):
        plot_measure(runs, "owm")
    assert "own-spectrum" in list_drawables(runs)
    with pytest.raises(InputError, match="got 'zzz'; correct the name"):
        find_figures(runs, ["zzz"])


def test_a_column_is_refused_with_the_measure_that_records_it(tmp_path: Path) -> None:
    words = {
        "sgd-identity-error": "by the measure 'sgd_identity': .* or, for maps, sweep --measures sgd_identity",
        "relative-loss": "draw runs of synthetic maps",
        "noise-trace": r"measures=\[\"noise_trace\"\]",
    }
    for name, complaint in words.items():
        with pytest.raises(InputError, match=f"got '{name}', which these runs did not record; .*{complaint}"):
            raise refuse_unknown(name, ["loss"], "--only")


def test_losses_of_maps_are_described_and_those_of_others_are_not(tmp_path: Path) -> None:
    for unit, meaning in (("1", "of a synthetic map"), (None, "as the training loop logged it")):
        extra = {} if unit is None else {"loss_unit": unit}
        writer = RunWriter(tmp_path / str(unit), Manifest(("t",), method="lora-2", problem="p", extra=extra))
        writer.append("steps", {"step": [1, 2], "loss": [2.0, 1.0]})
        writer.append("scalars", {"step": [1, 2], "name": ["excess_loss"] * 2, "value": [2.0, 1.0]})
        writer.close()
        runs = load_runs(tmp_path / str(unit))
        assert list_drawables(runs)["excess-loss"].column.meaning.startswith(meaning)
        assert list_drawables(runs)["grad-norm"].column.unit == ("1" if unit else "nats")
