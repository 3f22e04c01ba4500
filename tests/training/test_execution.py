from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from linchain_analysis import load_run
from linchain_analysis.errors import InputError, RunError
from linchain_analysis.runs.manifest import write_manifest
from linchain_analysis.training import Grid, GridResult, finetune, plan_runs, run_grid
from linchain_analysis.training.events import Event, RunFailed, RunFinished, RunStarted, RunStepped
from linchain_analysis.training.execution import _exclusive
from linchain_analysis.training.preparation import prepare
from linchain_analysis.training.progress import Show
from linchain_analysis.training.resumption import clear, find_standing
from linchain_analysis.training.workers import work_through

METHODS = ["lora-4", "linchain-1-4"]


class Kept:
    """A display that keeps the events, and does something at each."""

    def __init__(self, act: Any = None) -> None:
        self.events: list[Event] = []
        self._act = act

    @contextmanager
    def open(self, *, num_runs: int, num_complete: int) -> Iterator[Show]:
        def show(event: Event) -> None:
            self.events.append(event)
            if self._act is not None:
                self._act(event)

        yield show

    def names(self, kind: type) -> list[str]:
        return [event.name for event in self.events if isinstance(event, kind)]


@pytest.fixture(scope="module")
def shared(tiny_model: str, tiny_data: str) -> dict[str, Any]:
    return {
        "model": tiny_model,
        "data": tiny_data,
        "num_eval": 4,
        "num_steps": 4,
        "batch_size": 4,
        "dropout": 0.1,
    }


@pytest.fixture(scope="module")
def grid(shared: dict[str, Any]) -> Grid:
    return Grid(methods=METHODS, learning_rates=[0.02], seeds=[0, 1], shared=shared)


@pytest.fixture(scope="module")
def finished(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GridResult, Kept]:
    out = tmp_path_factory.mktemp("sweep")
    display = Kept()
    return out, run_grid(grid, out, num_workers=2, progress=display), display


def pretend_unfinished(folder: Path) -> None:
    """Make a run look as if its process had been killed."""
    write_manifest(folder, replace(load_run(folder).manifest, status="running"))


def fingerprint(out: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of every manifest: any run that was made again differs."""
    found = {path.parent.name: path.stat() for path in out.glob("*/manifest.json")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def test_every_cell_becomes_a_run(finished: tuple[Path, GridResult, Kept], grid: Grid) -> None:
    out, result, display = finished
    names = [run.name for run in grid.runs(0.1)]
    assert [path.name for path in result.complete] == names
    assert (result.num_skipped, result.failed) == (0, ())
    assert sorted(display.names(RunFinished)) == sorted(names)
    assert {event.worker for event in display.events} == {1, 2}
    assert set(display.names(RunStepped)) == set(names)
    assert json.loads((out / "sweep.json").read_text(encoding="utf-8")) == {
        "grid": json.loads(json.dumps(grid.to_json())),
        "runs": names,
    }


def test_runs_do_not_depend_on_worker_or_order(
    finished: tuple[Path, GridResult, Kept], grid: Grid, tmp_path: Path
) -> None:
    out, _, _ = finished
    runs = plan_runs(grid)
    prepared = prepare(runs[0].settings)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers: another number of threads may round differently
    try:
        for run in reversed(runs):
            finetune(run.settings, tmp_path / run.name, prepared=prepared)
    finally:
        torch.set_num_threads(before)
    for run in runs:
        here, there = load_run(tmp_path / run.name), load_run(out / run.name)
        np.testing.assert_array_equal(here.steps["loss"].to_numpy(), there.steps["loss"].to_numpy())
        np.testing.assert_array_equal(here.factors["weight_norm"].to_numpy(), there.factors["weight_norm"].to_numpy())
        np.testing.assert_array_equal(here.evals["value"].to_numpy(), there.evals["value"].to_numpy())


def test_runs_are_sorted_by_what_is_left_to_do(
    finished: tuple[Path, GridResult, Kept], grid: Grid, tmp_path: Path
) -> None:
    out, _, _ = finished
    runs = plan_runs(replace(grid, seeds=[0, 1, 2]))
    for run in runs[:4]:
        shutil.copytree(out / run.name, tmp_path / run.name)
    pretend_unfinished(tmp_path / runs[1].name)
    (tmp_path / runs[4].name).mkdir()
    (tmp_path / runs[4].name / "manifest.json.part").write_text("{", encoding="utf-8")
    standing = find_standing(runs, tmp_path)
    assert standing.complete == (runs[0], runs[2], runs[3])
    assert standing.half_finished == (runs[1], runs[4])
    assert standing.missing == (runs[5],)
    assert standing.to_do == (runs[1], runs[4], runs[5])


def test_a_run_is_cleared_whole(tmp_path: Path) -> None:
    for folder in (tmp_path / "run", tmp_path / ".run.discarded"):  # the second: of a clearing that was cut short
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "weights").write_text("1", encoding="utf-8")
    clear(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_complete_grid_starts_no_worker(finished: tuple[Path, GridResult, Kept], grid: Grid) -> None:
    out, result, _ = finished
    display = Kept()
    assert run_grid(grid, out, progress=display).complete == result.complete
    assert display.events == []


def test_a_folder_with_other_settings_is_refused(
    finished: tuple[Path, GridResult, Kept], grid: Grid, shared: dict[str, Any]
) -> None:
    out, _, _ = finished
    before = fingerprint(out)
    longer = replace(grid, shared={**shared, "num_steps": 5})
    with pytest.raises(RunError, match="expected num_steps 5, got num_steps 4"):
        run_grid(longer, out, progress=Kept())
    assert fingerprint(out) == before


def test_a_folder_that_is_no_run_is_refused_and_left_alone(grid: Grid, tmp_path: Path) -> None:
    runs = plan_runs(grid)
    (tmp_path / runs[2].name).mkdir()
    (tmp_path / runs[2].name / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(RunError, match=f"{runs[2].name}: expected a run, got something without manifest"):
        find_standing(runs, tmp_path)
    assert (tmp_path / runs[2].name / "thesis.txt").exists()


def test_a_run_whose_manifest_is_damaged_is_refused(grid: Grid, tmp_path: Path) -> None:
    runs = plan_runs(grid)
    (tmp_path / runs[0].name).mkdir()
    (tmp_path / runs[0].name / "manifest.json").write_text("{half", encoding="utf-8")
    with pytest.raises(RunError, match="expected a run that can be read"):
        find_standing(runs, tmp_path)


def test_failed_runs_and_dead_workers_do_not_stop_the_others(grid: Grid, tmp_path: Path) -> None:
    runs = [run.name for run in grid.runs(0.1)]
    (tmp_path / runs[0]).symlink_to(tmp_path / "nowhere" / "at all")  # no run can be written there

    def kill(event: Event) -> None:
        if isinstance(event, RunStarted) and event.name == runs[1]:
            (process,) = multiprocessing.active_children()
            os.kill(process.pid or 0, signal.SIGKILL)

    display = Kept(kill)
    result = run_grid(grid, tmp_path, num_workers=1, progress=display)
    assert [event.name for event in result.failed] == runs[:2]
    assert "signal 9" in result.failed[1].error
    assert all(Path(event.log).is_file() for event in result.failed)
    assert "Traceback" in Path(result.failed[0].log).read_text(encoding="utf-8")
    assert [path.name for path in result.complete] == runs[2:]
    assert display.names(RunFailed) == runs[:2]
    assert multiprocessing.active_children() == []


def test_an_interrupt_ends_the_workers_and_the_next_call_goes_on(grid: Grid, tmp_path: Path) -> None:
    runs = [run.name for run in grid.runs(0.1)]

    def interrupt(event: Event) -> None:
        if isinstance(event, RunFinished) and event.name == runs[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_grid(grid, tmp_path, num_workers=1, progress=Kept(interrupt))
    assert multiprocessing.active_children() == []

    losses = load_run(tmp_path / runs[0]).steps["loss"].to_numpy()
    pretend_unfinished(tmp_path / runs[0])
    (tmp_path / runs[0] / "remains.txt").write_text("of the first attempt", encoding="utf-8")
    before = fingerprint(tmp_path)
    display = Kept()
    result = run_grid(grid, tmp_path, num_workers=1, progress=display)
    assert [path.name for path in result.complete] == runs
    # The third run was under way, and may have ended before its worker did.
    assert result.num_skipped in (1, 2)
    assert display.names(RunStarted) in ([runs[0], *runs[2:]], [runs[0], runs[3]])
    assert fingerprint(tmp_path)[runs[1]] == before[runs[1]]
    assert not (tmp_path / runs[0] / "remains.txt").exists()
    np.testing.assert_array_equal(load_run(tmp_path / runs[0]).steps["loss"].to_numpy(), losses)
    assert [path.name for path in tmp_path.iterdir() if "discarded" in path.name] == []


def test_workers_that_cannot_start_are_reported(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('no torch today')", encoding="utf-8")
    # Children get the parent's sys.path as it is when they are started.
    monkeypatch.syspath_prepend(str(broken.parent))
    with pytest.raises(RunError, match=r"worker 1: expected a process that starts, got exit code 1"):
        list(work_through(plan_runs(grid), tmp_path, num_workers=1))
    assert "no torch today" in (tmp_path / "logs" / "worker-1.log").read_text(encoding="utf-8")


def test_two_sweeps_do_not_share_a_folder(grid: Grid, tmp_path: Path) -> None:
    with _exclusive(tmp_path), pytest.raises(RunError, match="expected a folder that no other sweep writes to"):
        run_grid(grid, tmp_path, progress=Kept())


def test_a_place_that_cannot_be_written_is_refused(grid: Grid, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match="expected a folder that can be written, got Not a directory"):
        run_grid(grid, tmp_path / "file" / "below", progress=Kept())
    with pytest.raises(RunError, match="expected a folder that can be written, got File exists"):
        run_grid(grid, tmp_path / "file", progress=Kept())


def test_what_cannot_be_trained_is_refused_before_anything_is_written(shared: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for change, complaint in (
        ({"methods": ["lora-4", "chainlora-7"]}, "chainlora-7"),
        ({"shared": {**shared, "data": str(tmp_path / "nowhere.json")}}, r"nowhere\.json"),
        ({"shared": {**shared, "model": str(tmp_path / "nomodel")}}, "nomodel"),
        ({"shared": {**shared, "data": None, "problem": "riddles"}}, "riddles"),
    ):
        with pytest.raises(InputError, match=complaint):
            run_grid(Grid(**{"methods": METHODS, "shared": shared, **change}), out, progress=Kept())
    with pytest.raises(InputError, match="num_workers: expected at least 1, got 0"):
        run_grid(Grid(methods=METHODS, shared=shared), out, num_workers=0, progress=Kept())
    assert not out.exists()
