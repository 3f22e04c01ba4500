"""Paths of small chains: the numbers of the runs that the grid writes, kept as matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from linchain_analysis.errors import InputError
from linchain_analysis.measures.theory.gradients import multiply_chain
from linchain_analysis.problems.synthetic import MapSetting
from linchain_analysis.runs import load_runs
from linchain_analysis.training.synthetic import MapGrid, OptimizerSettings, run_map_grid
from linchain_analysis.training.synthetic.paths import trace_maps

FLAT = MapSetting("shear-rotation", dim=2, target_rank=2)
METHODS = ["lora-2", "linchain-2-2", "moslora-2-orthogonal"]


@pytest.fixture(scope="module")
def grid() -> MapGrid:
    return MapGrid(FLAT, METHODS, [0.05, 0.1], range(2), OptimizerSettings("adam"), num_steps=20, scale=0.5)


def test_paths_are_those_of_the_runs(grid: MapGrid, tmp_path: Path) -> None:
    paths = trace_maps(grid)
    run_map_grid(grid, tmp_path, num_threads=1)
    runs = {f"{run.problem}/{run.path.name}": run for run in load_runs(tmp_path)}
    assert sorted(paths.labels["run"]) == sorted(runs)
    losses = paths.losses.set_index(["run", "step"])["relative_loss"]
    for k, name in enumerate(paths.labels["run"]):
        np.testing.assert_allclose(losses[name], runs[name].steps["relative_loss"], rtol=1e-12)
        error = ((paths.deltas[k] - paths.targets[k]) ** 2).sum(axis=(-2, -1)) / (paths.targets[k] ** 2).sum()
        np.testing.assert_allclose(error, paths.relative_loss[k], rtol=1e-12)
        stored = np.stack(runs[name].modules["spectrum"].to_list()[:5])
        # Spectra are stored as float32.
        np.testing.assert_allclose(np.linalg.svd(paths.deltas[k, 1:6], compute_uv=False), stored, rtol=1e-6, atol=1e-7)


def test_factors_lead_from_the_first_to_the_last_delta(grid: MapGrid) -> None:
    paths = trace_maps(grid)
    assert not paths.deltas[:, 0].any()
    for k, method in enumerate(paths.labels["method"]):
        first, last = paths.initial[k], paths.final[k]
        inner = {"lora-2": 0, "linchain-2-2": 2}.get(method, 1)
        assert list(first) == ["A", *(f"W{i + 1}" for i in range(inner)), "B"] == list(last)
        assert not first["B"].any()
        np.testing.assert_allclose(0.5 * multiply_chain(list(last.values())), paths.deltas[k, -1], rtol=1e-13)


def test_a_diverged_path_breaks_off() -> None:
    paths = trace_maps(MapGrid(FLAT, ["lora-2"], [100.0, 0.1], [0], OptimizerSettings("gd"), num_steps=60))
    assert np.isnan(paths.relative_loss[0, -1])
    assert np.isnan(paths.deltas[0, -1]).all()
    assert np.isfinite(paths.deltas[1]).all()


def test_paths_that_would_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="paths of at most 1 GiB"):
        trace_maps(MapGrid(MapSetting(dim=1024), ["lora-8"], [0.1], range(10)))
