"""Training scripts as people write them, unchanged under the launcher: each is compared with what it says itself."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from linchain_analysis import load_run
from linchain_analysis.runs import Run

SCRIPTS = Path(__file__).with_name("scripts")
# What the Trainer prints of the time it took differs from run to run.
SPEED = re.compile(r"'\w*(runtime|per_second|preparation_time)': '[^']*'")


@dataclass(frozen=True)
class Outcome:
    """What a process left."""

    code: int
    out: str
    err: str

    def said(self, kind: str) -> pd.DataFrame:
        """What the script printed in its lines `kind name=value …`."""
        rows = [dict(pair.split("=") for pair in line.split()[1:]) for line in self.lines(kind)]
        return pd.DataFrame(rows).map(lambda text: float(text) if re.fullmatch(r"[-+.\de]+|nan|inf", text) else text)

    def lines(self, kind: str) -> list[str]:
        return [line for line in self.out.splitlines() if line.startswith(f"{kind} ")]


def run_both_ways(script: str | Path, folder: Path, *arguments: str, options: tuple[str, ...] = ()) -> Outcome:
    """Run a script with the tracker, side by side with the same script without, and hold that it printed the same."""
    path = str(SCRIPTS / script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    processes = []
    for name, tracker in {
        "plain": (),
        "tracked": ("-m", "linchain_analysis.track", "--out", str(folder / "run"), *options),
    }.items():
        (folder / name).mkdir()
        process = subprocess.Popen(
            [sys.executable, *tracker, path, *arguments],
            cwd=folder / name,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        processes.append(process)
    plain, tracked = (Outcome(*_finish(process)) for process in processes)
    assert (tracked.code, SPEED.sub("", tracked.out)) == (plain.code, SPEED.sub("", plain.out)), tracked.err
    return tracked


def _finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def assert_recorded(run: Run, said: pd.DataFrame, **tolerances: float) -> None:
    """Hold that `steps` is what the script said, in every column that it said something of."""
    assert run.steps["step"].tolist() == list(range(1, len(said) + 1))
    for column in said.columns:
        rtol = tolerances.get(column, 1e-6)
        np.testing.assert_allclose(
            run.steps[column].astype(float), said[column].astype(float), rtol=rtol, err_msg=column
        )
    recorded = run.modules.groupby("step").size()
    assert recorded.index.tolist() == run.steps["step"].tolist()
    assert recorded.nunique() == 1


@pytest.mark.slow
def test_a_gradient_scaler_that_skips_its_first_steps(tmp_path: Path) -> None:
    done = run_both_ways("amp_loop.py", tmp_path)
    assert done.code == 0, done.err
    run, said = load_run(tmp_path / "run"), done.said("step")
    assert 1 <= said["skipped"].sum() < len(said) - 2
    # A skipped step has no norm; clip_grad_norm_ said nan or inf as its own arithmetic had it.
    assert not np.isfinite(run.steps["grad_norm"][said["skipped"] == 1]).any()
    said["grad_norm"] = said["grad_norm"].where(said["skipped"] == 0, run.steps["grad_norm"])
    assert_recorded(run, said)
    taken = run.steps[said["skipped"] == 0]
    np.testing.assert_allclose(taken["clip_coef"], 0.05 / (taken["grad_norm"] + 1e-6), rtol=1e-6)


def test_an_accelerate_loop(tmp_path: Path) -> None:
    done = run_both_ways("accelerate_loop.py", tmp_path)
    assert done.code == 0, done.err
    run = load_run(tmp_path / "run")
    assert_recorded(run, done.said("step"))
    assert run.modules["module"].unique().tolist() == ["0", "2"]
    assert (run.steps["clip_coef"] < 1).all()


def test_a_trainer_with_its_epochs_tokens_and_evaluations(tmp_path: Path) -> None:
    done = run_both_ways("trainer.py", tmp_path, "out")
    assert done.code == 0, done.err
    run = load_run(tmp_path / "run")
    assert_recorded(run, done.said("step").join(done.said("rate")))
    np.testing.assert_allclose(run.steps["clip_coef"], 0.01 / (run.steps["grad_norm"] + 1e-6), rtol=1e-6)
    evaluations = done.said("eval")
    assert evaluations["step"].tolist() == run.evals["step"].tolist() == [0, 2, 4, 6, 6]
    np.testing.assert_allclose(run.evals["value"], evaluations["loss"], rtol=1e-6)
    assert (run.base_learning_rate, run.init_seed, run.data_seed, run.manifest.num_steps) == (1e-2, 7, 7, 6)
    assert run.status == "complete"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_an_sft_trainer(tmp_path: Path) -> None:
    done = run_both_ways("sft.py", tmp_path, "out")
    assert done.code == 0, done.err
    run = load_run(tmp_path / "run")
    assert_recorded(run, done.said("step"))
    assert (run.steps["clip_coef"] < 1).all()
    assert run.manifest.num_steps == 4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")
@pytest.mark.parametrize("way", ["automatic", "manual"])
def test_a_lightning_module(tmp_path: Path, way: str) -> None:
    done = run_both_ways("lightning_module.py", tmp_path, *(["--manual"] if way == "manual" else []))
    assert done.code == 0, done.err
    run = load_run(tmp_path / "run")
    assert_recorded(run, done.said("step"))
    assert (run.steps["clip_coef"] < 1).all()


@pytest.mark.slow
def test_one_training_after_the_other_in_many_ways_with_options_named_like_ours(tmp_path: Path) -> None:
    names = ["compiled", "whole", "reentrant", "checkpointed", "bf16", "autocast", "two", "crash"]
    done = run_both_ways("variants.py", tmp_path, "--out", "mine", "--preset", "light", *names)
    assert done.code == 1
    assert done.err.strip().endswith("RuntimeError: the script's own failure")
    assert "linchain_analysis/tracking" not in done.err
    said = done.said("step")
    trained = [*names[:6], "two-0", "two-1"]
    for number, name in enumerate(trained, start=1):
        run = load_run(tmp_path / ("run" if number == 1 else f"run-{number}"))
        # In bfloat16 clip_grad_norm_ rounds the norm it returns to 8 bits.
        rough = {"grad_norm": 2.0**-8} if name == "bf16" else {}
        assert_recorded(run, said[said["run"] == name].drop(columns="run").reset_index(drop=True), **rough)
        assert run.modules["module"].unique().tolist() == ["first", "second"]
        assert run.status == "complete", name  # each ended before the script failed
    assert len(list(tmp_path.glob("run*"))) == len(trained)


@pytest.mark.slow
def test_a_training_that_outlives_the_script(tmp_path: Path) -> None:
    done = run_both_ways("threaded.py", tmp_path)
    assert done.code == 0, done.err
    run = load_run(tmp_path / "run")
    assert_recorded(run, done.said("step"))
    assert run.status == "complete"


@pytest.mark.slow
def test_a_script_that_tracks_itself_is_not_tracked_twice(tmp_path: Path) -> None:
    done = run_both_ways("own_tracking.py", tmp_path, "out", "first", "second")
    assert done.code == 0, done.err
    assert not (tmp_path / "run").exists()
    assert "the script tracks its training itself" in done.err
    for name, num_steps in {"first": 3, "second": 2}.items():
        untracked = load_run(tmp_path / "plain" / name)
        run = load_run(tmp_path / "tracked" / name)
        assert run.status == "complete"
        assert len(run.steps) == num_steps
        pd.testing.assert_series_equal(run.steps["grad_norm"], untracked.steps["grad_norm"])
        pd.testing.assert_series_equal(run.steps["loss"], untracked.steps["loss"])


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("whole", "got 3 optimiser steps, none of an adapter (the script does not import PEFT); nothing was tracked."),
        ("idle", "got 1 optimiser, never seen to step; nothing was tracked."),
        pytest.param("frozen", "got no optimiser; nothing was tracked.", marks=pytest.mark.slow),
    ],
    ids=["whole", "idle", "frozen"],
)
def test_a_script_without_anything_to_track_runs_on_and_is_told(tmp_path: Path, way: str, message: str) -> None:
    done = run_both_ways("no_adapter.py", tmp_path, way)
    assert done.code == 0, done.err
    assert message in done.err
    assert not (tmp_path / "run").exists()
