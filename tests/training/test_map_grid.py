"""Grids of synthetic maps: the tables of a tracker, whoever trains beside a run, and a sweep that can be cut short."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import get_peft_model
from torch import nn

from linchain_analysis import Tracker, load_run, load_runs, method_config
from linchain_analysis.adapters import read_factors
from linchain_analysis.analysis.summary import summarise_methods
from linchain_analysis.errors import InputError, LinchainError, RunError
from linchain_analysis.method_names import parse_method
from linchain_analysis.problems.synthetic import MapSetting
from linchain_analysis.runs import Run, read_snapshots
from linchain_analysis.runs.complete import UNFINISHED
from linchain_analysis.training.events import Event, RunFinished, RunStarted
from linchain_analysis.training.synthetic import (
    ADAM_RATES,
    DEFAULT_METHODS,
    GD_RATES,
    MapGrid,
    MapRunSettings,
    OptimizerSettings,
    execution,
    run_map_grid,
)
from linchain_analysis.training.synthetic.initial_stacks import draw_factors
from linchain_analysis.training.synthetic.recording import choose_steps, spaced_steps

TABLES = ("steps", "modules", "factors", "links", "evals")
SMALL = MapSetting("shear-rotation", dim=10, target_rank=4)


class Silent:
    """Shows nothing, and keeps what happened."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.counts: dict[str, int] = {}

    @contextmanager
    def open(self, **counts: int) -> Iterator[Any]:
        self.counts = counts
        yield self.events.append


def train(grid: MapGrid, out: Path, **options: Any) -> list[Run]:
    result = run_map_grid(grid, out, progress=Silent(), **options)
    assert not result.failed
    return [load_run(folder) for folder in result.complete]


def small_grid(**changes: Any) -> MapGrid:
    given = {"methods": ["linchain-2-3-w3"], "learning_rates": [0.05], "seeds": [0], "num_steps": 12, **changes}
    return MapGrid(given.pop("problem", SMALL), **given)


# --- the tables are a tracker's ------------------------------------------------------------------------------------

# The tracker takes R from Gram matrices, whose small singular values are off by √eps of the largest; in GD a gradient
# and its update are parallel, which makes the Gram matrices singular.
LOOSE = {"grad_effective_rank": 1e-5, "grad_spectrum": 1e-6}


def track(settings: MapRunSettings, folder: Path) -> Run:
    """Train the same chain as a model of PyTorch, with a tracker, in float64."""
    maps = settings.problem.draw([settings.data_seed])
    d_in, d_out = settings.problem.shape
    base = nn.Sequential(nn.Linear(d_in, d_out, bias=False)).double()
    nn.init.zeros_(base[0].weight)
    config = method_config(settings.method, target_modules=["0"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    layer: Any = model.base_model.model[0]
    for (_, parameter, _), factor in zip(read_factors(layer, "default"), draw_factors(settings), strict=True):
        parameter.data.copy_(torch.from_numpy(factor.T.copy()))
    # d_in rows whose covariance is I, which without samples is meant.
    population = maps.design is None
    inputs = np.sqrt(d_in) * torch.eye(d_in).double() if population else torch.from_numpy(maps.design[0])
    weight = maps.weight / d_in if population else maps.weight
    labels = inputs @ torch.from_numpy(maps.targets[0])
    if maps.noise is not None:
        labels = labels + torch.from_numpy(maps.noise[0])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = {"gd": torch.optim.SGD, "adam": torch.optim.Adam}[settings.optimizer.name]
    optimizer = kind(parameters, lr=settings.learning_rate)
    with Tracker(model, optimizer, folder, preset=settings.preset, every=settings.every, strict=True):
        for _ in range(settings.num_steps):
            optimizer.zero_grad()
            loss = 0.5 * weight * ((model(inputs) - labels) ** 2).sum()
            loss.backward()
            optimizer.step()
    return load_run(folder)


@pytest.mark.parametrize(
    "data", [{}, {"num_samples": 20, "label_noise": 0.1, "input_decay": 1.0}], ids=["exact", "noisy"]
)
@pytest.mark.parametrize("optimizer", ["gd", "adam"])
@pytest.mark.parametrize("method", ["lora-4", "linchain-3-4"])
def test_the_tables_are_those_of_a_tracker_on_a_model(
    method: str, optimizer: Any, data: dict[str, Any], tmp_path: Path
) -> None:
    setting = MapSetting("shear-rotation", dim=12, dim_out=9, target_rank=4, **data)
    grid = MapGrid(
        setting,
        [method],
        [0.02],
        [3],
        optimizer=OptimizerSettings(optimizer),
        num_steps=56,
        scale=None,
        preset="full",
        every=3,
    )
    (run,) = train(grid, tmp_path / "grid")
    tracked = track(grid.runs()[0].settings, tmp_path / "tracked")
    for table in ("steps", "modules", "factors", "links"):
        got, expected = run.read(table), tracked.read(table)
        assert set(expected) <= set(got)
        for name in set(expected) - {"module", "kind", "layer", "seconds", "track_seconds"}:
            if optimizer == "gd" and name == "delta_update_numerical_rank":
                assert (got[name] >= expected[name]).all()  # the tracker leaves out directions at √eps
                continue
            compare_columns(got[name], expected[name], LOOSE.get(name, 1e-6))  # stored in float32
    assert run.links["balance_drift"].notna().all()
    assert run.modules["gradient_capture"].notna().sum() == 2  # steps 3 and 54
    for got_snapshot, expected_snapshot in zip(read_snapshots(run), read_snapshots(tracked), strict=True):
        assert got_snapshot.step == expected_snapshot.step
        for name in ("delta", "update"):
            got_core, core = (np.linalg.norm(getattr(s.cores, name)) for s in (got_snapshot, expected_snapshot))
            assert got_core == pytest.approx(core, rel=1e-9)  # Gram matrices again


def compare_columns(got: pd.Series[Any], expected: pd.Series[Any], tolerance: float) -> None:
    assert len(got) == len(expected)
    if not pd.api.types.is_numeric_dtype(expected):
        assert (got.isna() == expected.isna()).all()
        for one, other in zip(got.dropna(), expected.dropna(), strict=True):
            if isinstance(other, str):
                assert one == other
            else:
                assert len(one) == len(other)
                size = np.nanmax(np.abs(other), initial=0.0)
                np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * size + 1e-12, err_msg=str(got.name))
        return
    one, other = got.to_numpy(dtype=float, na_value=np.nan), expected.to_numpy(dtype=float, na_value=np.nan)
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=1e-12, err_msg=str(got.name))


def test_what_does_not_train_has_no_gradient_and_no_capture_of_its_own(tmp_path: Path) -> None:
    (run,) = train(small_grid(methods=["linchain-2-3-w3"], freeze_inner=True, preset="full", every=1), tmp_path)
    factors = run.factors.set_index("factor")
    assert factors.loc[["W1", "W2"], ["grad_norm", "grad_cosine_previous"]].isna().all(axis=None)
    assert (factors.loc[["W1", "W2"], "update_norm"] == 0).all()
    outer = run.factors[run.factors["factor"].isin(["A", "B"])]
    total = np.sqrt(outer.groupby("step")["grad_norm"].apply(lambda g: (g.astype(float) ** 2).sum()))
    np.testing.assert_allclose(run.steps["grad_norm"], total, rtol=1e-6)  # stored in float32
    assert (run.modules["gradient_capture"].dropna() <= 1).all()


# --- each run is a run of its own ----------------------------------------------------------------------------------


def test_a_run_does_not_depend_on_its_neighbours_or_on_threads(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"num_steps": 25, "preset": "full", "optimizer": OptimizerSettings("gd"), "problem": SMALL}
    methods = ["lora-3", "linchain-2-3-w3", "linchain-2-3-w3-orthogonal"]
    grid = MapGrid(methods=methods, learning_rates=[0.01, 50.0], seeds=[0, 5], **shared)
    together = {run.path.name: run for run in train(grid, tmp_path / "all", num_threads=2)}
    assert len(together) == 12
    for method, rate, seed in [
        ("lora-3", 0.01, 0),
        ("linchain-2-3-w3", 50.0, 5),
        ("linchain-2-3-w3-orthogonal", 0.01, 5),
    ]:
        alone = MapGrid(methods=[method], learning_rates=[rate], seeds=[seed], **shared)
        (run,) = train(alone, tmp_path / "one" / method, num_threads=1)
        for table in TABLES:
            pd.testing.assert_frame_equal(run.read(table), together[run.path.name].read(table), check_exact=True)


@pytest.mark.parametrize("rates", [[1e30], [1e30, 0.1]])
def test_a_run_that_diverges_at_once_has_all_rows_whoever_is_beside_it(rates: list[float], tmp_path: Path) -> None:
    grid = small_grid(
        methods=["lora-3"], learning_rates=rates, optimizer=OptimizerSettings("gd"), preset="full", every=4
    )
    run = train(grid, tmp_path)[0]
    assert run.base_learning_rate == 1e30 and len(run.read("steps")) == 12
    assert len(run.modules) == 3 and len(run.factors) == 6 and len(run.links) == 3
    assert run.factors["weight_norm"].isna().all() and run.modules["spectrum"].map(np.isnan).map(np.all).all()


def test_rates_of_factors_are_told_as_the_first_group_s(tmp_path: Path) -> None:
    (run,) = train(small_grid(methods=["lora-3"], learning_rates=[0.02], factor_rates={"A": 0.5, "B": 4}), tmp_path)
    assert (run.steps["learning_rate"] == 0.01).all() and run.base_learning_rate == 0.02


def test_population_measures_of_noisy_samples_are_those_of_new_inputs(tmp_path: Path) -> None:
    """Written out dense: the excess over the best of rank 3, and the spectrum of ΔW behind inputs of covariance C."""
    problem = MapSetting("spectrum", dim=5, spectrum=(4.0, 3.0, 2.0, 1.0), input_decay=1.0, label_noise=0.5)
    grid = small_grid(problem=replace(problem, num_samples=9), methods=["lora-3"], preset="full", every=1)
    (run,) = train(grid, tmp_path / "samples")
    root = np.diag(np.arange(1, 6.0) ** -0.5)
    target = problem.draw([grid.seeds[0]]).targets[0]
    tail = np.linalg.svd(root @ target, compute_uv=False)[3:]
    evals = run.evals.set_index(["metric", "step"])["value"]
    start = ((root @ target) ** 2).sum() / 2
    assert evals["population_excess_loss", 0] == pytest.approx(start - (tail**2).sum() / 2, rel=1e-12)
    # Activations are those of the forward pass, so that step 2 shows what step 1 left.
    second = small_grid(problem=problem, methods=["lora-3"], preset="full", every=2, num_steps=2)
    (run,) = train(second, tmp_path / "population")
    expected = np.linalg.svd(root @ first_delta(grid.runs()[0].settings, problem), compute_uv=False)[:3]
    np.testing.assert_allclose(run.modules["data_weighted_spectrum"].iloc[0][:2], expected[:2], rtol=1e-5)  # float32


def first_delta(settings: MapRunSettings, problem: MapSetting) -> np.ndarray[Any, Any]:
    """ΔW after one step of Adam from B = 0: B becomes −η sign(∂L/∂B) up to Adam's ε."""
    a, b = draw_factors(settings)
    maps = problem.draw([settings.data_seed])
    gradient = maps.evaluate((a @ b)[None], np.zeros(1, dtype=int))[1][0]
    slope = a.T @ gradient
    return np.asarray(a @ (-settings.learning_rate * slope / (np.abs(slope) + 1e-8)))


def test_methods_of_one_seed_start_alike() -> None:
    grid = small_grid(methods=["lora-4", "linchain-2-4", "linchain-3-4", "linchain-3-4-orthogonal", "linchain-3-4-he"])
    lora, two, three, orthogonal, he = (draw_factors(run.settings) for run in grid.runs())
    for factors in (two, three, orthogonal, he):
        np.testing.assert_array_equal(factors[0], lora[0])
        assert not factors[-1].any()
    np.testing.assert_array_equal(two[1], three[1])
    np.testing.assert_array_equal(two[2], three[2])
    np.testing.assert_allclose(he[1], np.sqrt(6) * three[1], rtol=1e-14)  # gains √2 and 1/√3
    np.testing.assert_allclose(orthogonal[1] @ orthogonal[1].T, np.eye(4), atol=1e-14)
    assert np.abs(np.corrcoef(three[1].ravel(), three[2].ravel())[0, 1]) < 0.9
    other = draw_factors(small_grid(methods=["lora-4"], seeds=[1]).runs()[0].settings)
    assert not np.isclose(other[0], lora[0]).any()


def test_gains_multiply_what_is_drawn() -> None:
    plain, scaled = (
        draw_factors(small_grid(first_gain=first, inner_gain=inner).runs()[0].settings)
        for first, inner in ((1.0, 1.0), (0.5, 3.0))
    )
    np.testing.assert_array_equal(scaled[0], 0.5 * plain[0])
    np.testing.assert_array_equal(scaled[1], 3 * plain[1])


def test_initial_factors_are_not_drawn_from_the_stream_of_the_target() -> None:
    """Uniform numbers of A and Gaussian ones of the target would be correlated if seed k began the same stream."""
    settings = small_grid(methods=["lora-10"]).runs()[0].settings
    a = draw_factors(settings)[0]
    for entropy in (0, [0], *([0, part] for part in range(4))):
        first = np.random.default_rng(entropy).uniform(-1, 1, a.shape)
        assert np.abs(np.corrcoef(a.ravel(), first.ravel())[0, 1]) < 0.5


def test_a_single_step_by_hand(tmp_path: Path) -> None:
    """d = 1, r = 1, GD: A = a, B = 0, so B becomes ηat and ΔW = ηa²t; the loss ½t² becomes ½t² (1 − ηa²)²."""
    problem = MapSetting("spectrum", dim=1, spectrum=(3.0,))
    grid = MapGrid(problem, ["lora-1"], [0.125], [4], optimizer=OptimizerSettings("gd"), num_steps=1)
    (run,) = train(grid, tmp_path)
    a = float(draw_factors(grid.runs()[0].settings)[0][0, 0])
    left = (1 - 0.125 * a**2) ** 2
    row = run.steps.iloc[0]
    assert row["loss"] == pytest.approx(4.5, rel=1e-14)
    assert row["grad_norm"] == pytest.approx(abs(3 * a), rel=1e-14)
    assert row["relative_loss"] == pytest.approx(left, rel=1e-14)
    assert row["excess_loss"] == pytest.approx(4.5 * left, rel=1e-14)
    assert (row["clip_coef"], row["skipped"], row["learning_rate"]) == (1.0, False, 0.125)
    assert np.isnan(row["seconds"]) and np.isnan(row["track_seconds"])
    assert run.modules["delta_norm"].tolist() == pytest.approx([0.125 * a**2 * 3], rel=1e-6)  # stored in float32
    evals = run.evals.set_index(["metric", "step"])["value"]
    assert evals["relative_loss", 0] == 1.0 and evals["relative_loss", 1] == row["relative_loss"]
    assert evals["population_excess_loss", 0] == pytest.approx(4.5) and set(run.evals["split"]) == {"population"}


def test_the_scale_is_the_methods_own_where_it_is_none(tmp_path: Path) -> None:
    runs = [train(small_grid(scale=scale), tmp_path / str(scale))[0] for scale in (None, 2.0)]
    assert [run.manifest.modules[0].scale for run in runs] == [2.0, 2.0]
    pd.testing.assert_frame_equal(runs[0].steps, runs[1].steps, check_exact=True)


def test_factors_can_have_rates_of_their_own(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"optimizer": OptimizerSettings("gd"), "num_steps": 1, "methods": ["lora-3"], "every": 1}
    (plain,) = train(small_grid(**shared), tmp_path / "plain")
    (plus,) = train(small_grid(factor_rates={"B": 16.0}, **shared), tmp_path / "plus")
    moved = plus.factors["update_norm"] / plain.factors["update_norm"]
    assert moved.tolist()[1] == pytest.approx(16, rel=1e-6)  # stored in float32
    assert plus.problem == f"{plain.problem}-rateB16"


# --- what a manifest says ------------------------------------------------------------------------------------------

BASE = MapRunSettings("lora-3", MapSetting("spectrum"), 0.1, 0, 0)
OTHER: dict[str, Any] = {
    "num_steps": 801,
    "scale": 0.5,
    "first_gain": 2.0,
    "inner_gain": 2.0,
    "freeze_inner": True,
    "factor_rates": {"B": 2.0},
    "name": "shear",
    "dim": 63,
    "dim_out": 65,
    "target_rank": 7,
    "spectrum": (2.0, 1.0),
    "input_decay": 1.0,
    "num_samples": 9,
    "batch_size": 9,
    "label_noise": 0.1,
    "observed": 0.5,
    "loss": "quartic",
    "momentum": 0.8,
    "beta1": 0.8,
    "beta2": 0.8,
    "epsilon": 1e-6,
    "weight_decay": 0.1,
}
NOT_IN_LABEL = {"method", "learning_rate", "init_seed", "data_seed", "preset", "measures", "every"}


@pytest.mark.parametrize("part", ["run", "problem", "optimizer"])
def test_runs_of_different_settings_have_different_problems(part: str) -> None:
    """Every field, those that somebody may add too, is in the label or is what a grid varies or only records."""
    labels = {BASE.label_problem()}
    owner: Any = BASE if part == "run" else getattr(BASE, part)
    names = {field.name for field in fields(owner)} - (
        NOT_IN_LABEL | {"problem", "optimizer"} if part == "run" else set()
    )
    for name in names:
        value = "gd" if (part, name) == ("optimizer", "name") else OTHER[name]
        changed = replace(owner, **{name: value})
        settings = changed if part == "run" else replace(BASE, **{part: changed})
        labels.add(settings.label_problem())
    assert len(labels) == len(names) + 1
    assert all(len(label) < 60 and "/" not in label and " " not in label for label in labels)


def test_labels_say_what_is_not_as_usual() -> None:
    assert MapGrid("shear").runs()[0].settings.label_problem() == "shear"
    setting = MapSetting("shear-rotation", dim=256, num_samples=160, label_noise=0.5)
    assert replace(BASE, problem=setting).label_problem() == "shear-rotation-d256-n160-noise0.5"
    two = replace(BASE, problem=MapSetting("shear", dim=2), optimizer=OptimizerSettings("gd"), scale=None)
    assert two.label_problem() == "shear-d2-gd-scale2"
    assert replace(BASE, scale=2.0).label_problem() == replace(BASE, scale=None).label_problem()


def test_the_manifest_says_what_it_takes_to_make_the_run_again(tmp_path: Path) -> None:
    problem = MapSetting("spectrum", dim=9, dim_out=7, spectrum=(2.0, 1.0))
    grid = small_grid(problem=problem, seeds=[6], methods=["linchain-2-3-w5"], measures=["imbalance"])
    (run,) = train(grid, tmp_path)
    manifest = run.manifest
    assert (run.method, run.problem) == ("linchain-2-3-w5", "spectrum-d9x7-sigma2_1-steps12")
    assert (run.base_learning_rate, run.init_seed, run.data_seed) == (0.05, 6, 6)
    assert (manifest.preset, manifest.every, manifest.num_steps, manifest.status) == (
        "standard",
        "auto",
        12,
        "complete",
    )
    (module,) = manifest.modules
    shapes = (("A", (9, 3)), ("W1", (3, 5)), ("W2", (5, 3)), ("B", (3, 7)))
    assert (module.module, module.factors, module.scale, module.d_in, module.d_out) == ("map", shapes, 1.0, 9, 7)
    settings = manifest.extra["settings"]
    assert settings == grid.runs()[0].settings.to_json()
    assert settings["spectrum"] == [2.0, 1.0] and settings["optimizer"] == "adam" and settings["problem"] == "spectrum"
    assert run.links["imbalance"].notna().all() and run.modules["spectrum"].map(len).unique().tolist() == [3]
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    assert sweep["runs"] == [run.path.name] and sweep["grid"]["shared"]["dim_out"] == 7


@pytest.mark.parametrize(("preset", "missing"), [("light", "spectrum"), ("standard", "order_ratios")])
def test_a_preset_records_no_more_than_it_says(preset: str, missing: str, tmp_path: Path) -> None:
    (run,) = train(small_grid(preset=preset), tmp_path)
    assert missing not in run.modules or run.modules[missing].isna().all()
    assert run.modules["delta_norm"].gt(0).all() and run.factors["update_norm"].gt(0).sum() >= len(run.modules)
    assert run.factors["grad_cosine_previous"].notna().any() == (preset == "standard")


def test_automatic_steps_are_dense_at_first_and_end_with_the_last() -> None:
    steps = choose_steps("auto", 800)
    assert steps[:20].tolist() == list(range(1, 21)) and steps[-1] == 800
    assert 70 <= len(steps) <= 80 and (np.diff(steps) > 0).all()
    assert np.diff(np.log(steps[40:].astype(float))).max() < 0.1  # evenly over the logarithm
    assert choose_steps("auto", 5).tolist() == [1, 2, 3, 4, 5]
    assert choose_steps(4, 10).tolist() == [4, 8] and choose_steps(20, 10).tolist() == []
    assert spaced_steps(np.array([3, 20, 52, 53, 90, 103]), 50).tolist() == [True, False, False, True, False, True]


# --- a sweep that is cut short -------------------------------------------------------------------------------------


def test_a_sweep_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = small_grid(methods=["lora-2", "moslora-2"], learning_rates=[0.01, 0.02], seeds=[0, 1])
    whole = {run.path.name: run for run in train(grid, tmp_path / "whole")}
    num_written = 0

    def killed(*arguments: Any) -> None:
        nonlocal num_written
        num_written += 1
        if num_written == 4:  # in the middle of the first stack
            raise KeyboardInterrupt
        write(*arguments)

    write = execution.write_run
    out = tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(execution, "write_run", killed)
        run_map_grid(grid, out, num_threads=1, progress=Silent())
    assert len(list(out.glob("*/manifest.json"))) == 3
    half = out / "moslora-2_lr0.01_seed0"  # as `kill -9` leaves one that is being written
    half.mkdir()
    for name in (UNFINISHED, "steps.parquet", "scalars.parquet.part"):
        (half / name).write_text("half")
    untouched = {path: path.stat().st_mtime_ns for path in out.glob("*/manifest.json")}
    silent = Silent()
    result = run_map_grid(grid, out, progress=silent)
    assert (len(result.complete), result.num_skipped, result.failed) == (8, 3, ())
    assert silent.counts == {"num_runs": 8, "num_complete": 3}
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    for folder in result.complete:
        for table in TABLES:
            pd.testing.assert_frame_equal(
                load_run(folder).read(table), whole[folder.name].read(table), check_exact=True
            )
    again = run_map_grid(grid, out, progress=silent)
    assert again.num_skipped == 8 and again.complete == result.complete


def test_a_folder_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    train(small_grid(), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        RunError, match=r"lr0\.05_seed0: expected scale 2\.0, input_decay 1\.0, got scale 1\.0, input_decay 0"
    ):
        run_map_grid(small_grid(problem=replace(SMALL, input_decay=1.0), scale=2.0), tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    larger = small_grid(seeds=[0, 1])
    assert run_map_grid(larger, tmp_path, progress=Silent()).num_skipped == 1


def test_a_folder_of_another_problem_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    """Names of runs do not say what is learned, so that at another rate no name would clash."""
    train(small_grid(), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    name = "shear-rotation-d10-rank4-steps12"
    for change in (
        {"problem": replace(SMALL, name="shear")},
        {"problem": replace(SMALL, label_noise=0.5)},
        {"optimizer": OptimizerSettings("gd")},
    ):
        other = small_grid(learning_rates=[0.1], **change)
        with pytest.raises(
            RunError, match=rf"expected no runs but those of .*, got linchain-2-3-w3.*, a run of {name};"
        ):
            run_map_grid(other, tmp_path)
    kept = [path for path in sorted(tmp_path.rglob("*")) if path in before]
    assert sorted(tmp_path.rglob("*")) == kept == before
    more = small_grid(methods=["linchain-2-3-w3", "lora-3"], learning_rates=[0.05, 0.1], seeds=[0, 1], preset="light")
    with pytest.raises(RunError, match="preset"):  # of a run of the same name
        run_map_grid(more, tmp_path)
    assert run_map_grid(replace(more, preset="standard"), tmp_path, progress=Silent()).num_skipped == 1


@pytest.mark.parametrize("content", ["notes.txt", "steps.parquet"])
def test_a_folder_of_something_else_is_left_alone(content: str, tmp_path: Path) -> None:
    name = small_grid().runs()[0].name
    (tmp_path / name).mkdir()
    (tmp_path / name / content).write_text("mine")
    with pytest.raises(RunError, match=r"expected a run, got something without manifest\.json"):
        run_map_grid(small_grid(), tmp_path)
    assert (tmp_path / name / content).read_text() == "mine"


def test_a_damaged_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (run,) = train(small_grid(), tmp_path)
    path = run.path / "manifest.json"
    path.write_text(path.read_text().replace("spectrum", "sprectum", 1))
    with pytest.raises(RunError, match=r"expected a run that can be read, got .*wrong checksum"):
        run_map_grid(small_grid(), tmp_path)
    assert path.exists()


def test_a_run_that_cannot_be_written_does_not_stop_the_others(tmp_path: Path) -> None:
    grid = small_grid(methods=["lora-2"], seeds=[0, 1, 2])
    (tmp_path / grid.runs()[1].name).symlink_to(tmp_path / "nowhere" / "at all")
    silent = Silent()
    result = run_map_grid(grid, tmp_path, progress=silent)
    assert [failure.name for failure in result.failed] == [grid.runs()[1].name]
    assert [folder.name for folder in result.complete] == [grid.runs()[0].name, grid.runs()[2].name]
    started, finished = silent.events[0], silent.events[-1]
    assert isinstance(started, RunStarted) and started.num_runs == 3
    assert isinstance(finished, RunFinished) and finished.num_runs == 2


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"methods": []}, "methods: expected at least one"),
        ({"methods": ["lora-3", "lora-3"]}, "methods: expected each once, got lora-3 twice"),
        ({"methods": ["full-finetune"]}, "got 'full-finetune', but a map has no weights of its own to train; leave it"),
        ({"learning_rates": [0.0]}, "learning_rates: expected a finite number.* more than 0, got 0.0"),
        ({"seeds": [-1]}, "seeds: expected a whole number of at least 0, got -1"),
        ({"seeds": [0, 0.5]}, "seeds: expected a whole number of at least 0, got 0.5"),
        ({"seeds": [True]}, "seeds: expected a whole number of at least 0, got True"),
        ({"num_steps": 0}, "num_steps: expected a whole number of at least 1, got 0"),
        ({"scale": 0.0}, "scale: expected a finite number.* more than 0"),
        ({"every": 0}, "every: expected a whole number of at least 1, got 0"),
        ({"every": "often"}, "every: expected a number ≥ 1 or \"auto\", got 'often'"),
        ({"preset": "ful"}, "did you mean 'full'"),
        ({"measures": ["imbalanse"]}, "did you mean 'imbalance'"),
        ({"factor_rates": {"C": 2.0}}, "factor_rates: expected keys A, W or B, got 'C'"),
        ({"factor_rates": {"B": -2.0}}, r"factor_rates\['B'\]: expected a finite number"),
        ({"problem": "shear-rotaton"}, "did you mean 'shear-rotation'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=complaint):
        run_map_grid(small_grid(**changes), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_no_threads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LinchainError, match="num_threads: expected at least 1, got 0"):
        run_map_grid(small_grid(), tmp_path / "runs", num_threads=0)


# --- odd cases -----------------------------------------------------------------------------------------------------


def test_a_diverging_rate_is_a_complete_run_that_counts_as_not_finite(tmp_path: Path) -> None:
    grid = small_grid(
        methods=["lora-3"], learning_rates=[0.01, 60.0], optimizer=OptimizerSettings("gd"), num_steps=40, preset="full"
    )
    stable, lost = train(grid, tmp_path)
    assert (stable.status, lost.status, lost.num_steps) == ("complete", "complete", 40)
    finite = np.isfinite(lost.steps["loss"])
    assert 1 < finite.sum() < 20 and finite[: finite.sum()].all()  # and never again
    assert lost.steps[["excess_loss", "relative_loss", "grad_norm"]].iloc[-20:].isna().all(axis=None)
    assert len(lost.modules) == len(stable.modules) and lost.modules["step"].tolist() == stable.modules["step"].tolist()
    later = lost.modules["step"] > finite.sum() + 1
    assert later.any() and lost.modules.loc[later, ["delta_norm", "effective_rank"]].isna().all(axis=None)
    assert lost.modules.loc[later, "spectrum"].map(lambda sigma: np.isnan(sigma).all()).all()
    assert lost.evals.set_index("step").loc[40, "value"].isna().all()
    table = summarise_methods(load_runs(tmp_path)).set_index(["measure", "base_learning_rate"])["num_finite"]
    assert table["final_loss"].to_dict() == {0.01: 1, 60.0: 0}
    assert table["final_effective_rank"].to_dict() == {0.01: 1, 60.0: 0}


def test_a_zero_target_is_learned_from_the_start(tmp_path: Path) -> None:
    (run,) = train(small_grid(problem=replace(SMALL, target_rank=0), preset="full"), tmp_path)
    assert (run.steps["loss"] == 0).all() and (run.steps["excess_loss"] == 0).all()
    assert run.steps["relative_loss"].isna().all()
    assert (run.modules["delta_norm"] == 0).all() and run.modules["effective_rank"].isna().all()
    assert run.evals.set_index("metric")["value"].loc["relative_loss"].isna().all()


@pytest.mark.parametrize("method", ["lora-8", "linchain-0-8", "linchain-3-8", "linchain-2-8-w3"])
def test_adapters_wider_than_the_map(method: str, tmp_path: Path) -> None:
    problem = MapSetting("rotation", dim=3, dim_out=2, target_rank=2)
    (run,) = train(small_grid(problem=problem, methods=[method], preset="full", num_steps=200), tmp_path)
    assert run.modules["spectrum"].map(len).unique().tolist() == [2]
    assert run.steps["loss"].iloc[-1] < 0.5 * run.steps["loss"].iloc[0]
    assert (run.modules["gradient_capture"].dropna() <= 1 + 1e-6).all()  # stored in float32


@pytest.mark.parametrize(
    ("shape", "rank"), [((64, None), 8), ((8, None), 8), ((2, None), 2), ((16, 3), 3), ((1, 9), 1)]
)
def test_default_methods_are_no_wider_than_the_map(shape: tuple[int, int | None], rank: int) -> None:
    setting = MapSetting("shear", dim=shape[0], dim_out=shape[1])
    grid = MapGrid(setting)
    assert [parse_method(name).widths for name in grid.methods] == [(rank,) * (n + 1) for n in range(5)]
    assert (tuple(grid.methods) == DEFAULT_METHODS) is (rank == 8)
    assert MapGrid(setting, ["lora-8"]).methods == ["lora-8"]


def test_default_rates_follow_optimiser_and_loss() -> None:
    def rates(optimizer: str, loss: str) -> set[float]:
        setting = MapSetting("shear", dim=4, loss=loss)  # type: ignore[arg-type]
        grid = MapGrid(setting, optimizer=OptimizerSettings(optimizer))  # type: ignore[arg-type]
        return {run.settings.learning_rate for run in grid.runs()}

    assert rates("adam", "quadratic") == rates("adamw", "quartic") == set(ADAM_RATES)
    assert rates("gd", "quadratic") == rates("momentum", "quadratic") == set(GD_RATES)
    assert rates("gd", "quartic") == {2.0**k for k in range(-3, 9)}


def test_two_dimensions_hold_shear_and_rotation(tmp_path: Path) -> None:
    grid = small_grid(
        problem=MapSetting("shear-rotation", dim=2), methods=["lora-2"], learning_rates=[0.1], num_steps=300
    )
    (run,) = train(grid, tmp_path)
    assert run.steps["relative_loss"].iloc[-1] < 1e-6
    golden = (1 + np.sqrt(5)) / 2  # the singular values of a shear by 1 are the golden ratio and its inverse
    np.testing.assert_allclose(run.modules["spectrum"].iloc[-1], [golden, 1 / golden], atol=1e-2)  # 1e-6 of the loss


def test_inputs_that_are_drawn_at_every_step_are_those_of_the_seed_alone(tmp_path: Path) -> None:
    problem = replace(SMALL, batch_size=16, label_noise=0.1)
    both = train(small_grid(problem=problem, seeds=[0, 1], preset="full"), tmp_path / "both")
    (one,) = train(small_grid(problem=problem, seeds=[1], preset="full"), tmp_path / "one")
    pd.testing.assert_frame_equal(both[1].steps, one.steps, check_exact=True)
    pd.testing.assert_frame_equal(both[1].modules, one.modules, check_exact=True)
    assert one.modules["full_grad_norm"].iloc[0] == pytest.approx(
        np.linalg.norm(problem.draw([1]).at_step(1).evaluate(np.zeros((1, 10, 10)), np.zeros(1, dtype=int))[1]),
        rel=1e-6,
    )  # stored in float32


def test_blas_uses_one_thread_meanwhile_and_then_as_many_as_before() -> None:
    """In a process of its own: the number is the whole process's, and this one may have been told to use one."""
    code = (
        "import numpy, tempfile; from threadpoolctl import threadpool_info\n"
        "import linchain_analysis.training.synthetic as maps, linchain_analysis.training.synthetic.batch as batch\n"
        "def counts(): return [entry['num_threads'] for entry in threadpool_info() if entry['user_api'] == 'blas']\n"
        "during, step = [], batch.factor_gradients\n"
        "def watch(*rest): during.append(max(counts())); return step(*rest)\n"
        "batch.factor_gradients, before = watch, counts()\n"
        "grid = maps.MapGrid('shear', ['lora-2', 'lora-4'], [0.1], [0], num_steps=3)\n"
        "maps.run_map_grid(grid, tempfile.mkdtemp())\n"
        "print(before, sorted(set(during)), counts())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1]
    before, during, after = (json.loads(f"[{part}]") for part in re.findall(r"\[(.*?)\]", said))
    if not any(count > 1 for count in before):
        pytest.skip("NumPy has no BLAS that can be told, or there is one core")
    assert during == [1]  # another BLAS, such as SciPy's, may be loaded in between
    assert set(after) == set(before)


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import linchain_analysis.training.synthetic as maps; "
        "import linchain_analysis.training.synthetic.tokens, tempfile; "
        "grid = maps.MapGrid('shear', ['lora-2'], [0.1], [0], num_steps=3); "
        "print(len(maps.run_map_grid(grid, tempfile.mkdtemp()).complete))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1"
