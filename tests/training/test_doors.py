from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from linchain_analysis import audit as audit_door
from linchain_analysis import figures as figures_door
from linchain_analysis import finetune as finetune_door
from linchain_analysis import load_run
from linchain_analysis import sweep as sweep_door
from linchain_analysis import watch as watch_door

SHARED = Path(__file__).resolve().parents[2] / "../shared"
STORIES = SHARED / "models/stories260k"
ARC = SHARED / "data/llm-adapters/ARC-Easy/train.json"


def call(door: object, *arguments: object) -> tuple[int, str]:
    """Return exit code and output of a command, as somebody sees it whose terminal is wide."""
    app = door.app  # type: ignore[attr-defined]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(part) for part in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def small(tiny_model: str, tiny_data: str) -> list[str]:
    return [*("--model", tiny_model, "--data", tiny_data, "--num-eval", "4"), *("--batch-size", "4", "--steps", "4")]


def test_finetune_trains_and_tells_what_it_measured(small: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, output = call(
        finetune_door, "--method", "linchain-3-4", "--learning-rate", "0.02", "--out", out, "--every", "2", *small
    )
    assert code == 0, output
    run = load_run(out)
    assert run.manifest.status == "complete"
    assert sorted(set(run.modules["step"])) == [2, 4]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    losses = run.evals[run.evals["metric"] == "loss"].sort_values("step")["value"]
    row = re.search(r"eval loss\D+([\d.]+)\D+([\d.]+)", output)
    assert row is not None
    assert [float(value) for value in row.groups()] == pytest.approx(losses.tolist(), rel=1e-3)  # printed: 4 digits
    assert f"run folder: {out}" in output.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--method", "chainlora-7"], "got 'chainlora-7'"),
        (["--method", "lora-4", "--learning-rate", "-1"], "learning_rate: expected a number above 0, got -1.0"),
        (["--method", "lora-4", "--every", "often"], "every: expected a whole number of at least 1, got 'often'"),
        (["--method", "lora-4", "--data", "nowhere.json"], "nowhere.json: expected a readable file"),
        (["--method", "lora-4", "--model", "./nomodel"], "model ./nomodel: expected a folder with a model"),
        (["--method", "lora-4", "--problem", "riddles"], "problem: expected one of sums, got 'riddles'"),
        (["--method", "lora-4", "--steps", "3", "--epochs", "1"], "either steps or epochs, got 3 and 1.0"),
        ([], "Missing option '--method'"),
    ],
)
def test_finetune_refuses_bad_input_in_one_line(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    code, output = call(finetune_door, "--out", tmp_path / "run", *arguments)
    assert code == 2
    assert complaint in output
    assert "started" not in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--methods", "lora-4,chainlora-7"], "got 'chainlora-7'"),
        (["--methods", "lora-4", "--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--methods", "lora-4", "--learning-rates", "0.1,fast"], "--learning-rates: expected numbers, got 'fast'"),
        (["--methods", "lora-4", "--learning-rates", "0.1,-0.2"], "learning_rate: expected a number above 0, got -0.2"),
        (["--methods", "lora-4,,lora-8"], "--methods: expected values separated by commas, got 'lora-4,,lora-8'"),
        (["--methods", "lora-4", "--demo"], "--methods: expected none beside --demo, got lora-4"),
        (["--methods", "lora-4", "--workers", "0"], "num_workers: expected at least 1, got 0"),
        (["--methods", "lora-4", "--data", "nowhere.json"], "nowhere.json: expected a readable file"),
        ([], "--methods: expected values separated by commas, got ''"),
    ],
)
def test_sweep_refuses_bad_input_in_one_line(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    code, output = call(sweep_door, "--out", tmp_path / "runs", *arguments)
    assert code == 2
    assert complaint in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


def test_sweep_reports_what_failed_prints_a_table_and_goes_on_when_started_again(
    small: list[str], tmp_path: Path
) -> None:
    obstacle = tmp_path / "lora-4_lr0.02_seed1"
    obstacle.symlink_to(tmp_path / "nowhere" / "at all")  # no run can be written there
    command = ["--methods", "lora-4,linchain-1-4", "--learning-rates", "0.02", "--seeds", 2, "--workers", 1]
    code, output = call(sweep_door, "--out", tmp_path, *command, *small)
    assert code == 1
    assert f"failed: {obstacle.name}: " in output
    assert "3 complete runs (0 of them from before)" in output
    assert "[4/4]" in output  # progress is told where there is no terminal

    obstacle.unlink()
    code, output = call(sweep_door, "--out", tmp_path, *command, *small)
    assert code == 0, output
    assert "3 of 4 runs are complete already" in output
    assert "4 complete runs (3 of them from before)" in output
    lines = output.splitlines()
    rows = [k for k, line in enumerate(lines) if re.match(r" *(lora-4|linchain-1-4) +0\.02 +2 ", line)]
    assert len(rows) == 2
    for k in rows:
        assert len(re.findall(r"[\d.e+-]+", lines[k].split(" 2 ")[1])) == 3  # loss, accuracy, effective rank
        assert len(re.findall(r"[\d.e+-]+ … [\d.e+-]+", lines[k + 1])) == 3  # and their intervals below


MAP = ["--problem", "shear-rotation", "--dim", 8, "--target-rank", 2, "--steps", 60]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--problem", "shear-rotaton"], "did you mean 'shear-rotation'?"),
        (["--problem", "riddles"], "expected one of sums (text) or rotation, shear, shear-rotation"),
        (["--problem", "shear", "--data", "x.json"], "--data: expected none with the problem shear (a synthetic map)"),
        (["--problem", "shear", "--accumulation", "1"], "--accumulation: expected none"),  # even if it is the default
        (["--problem", "shear", "--demo"], "--demo: expected none"),
        (["--problem", "sums", "--dim", "64"], "--dim: expected none with the problem sums (no synthetic map)"),
        (["--methods", "lora-4", "--optimizer", "gd"], "leave it out: it is for synthetic maps"),
        (["--problem", "shear", "--optimizer", "sgd"], "optimizer: expected one of gd, momentum, adam, adamw"),
        (["--problem", "shear", "--map-loss", "cubic"], "loss: expected one of quadratic, quartic"),
        (["--problem", "shear", "--scale", "much"], "--scale: expected a number or alpha, got 'much'"),
        (["--problem", "shear", "--methods", "full-finetune"], "got 'full-finetune'"),
        (["--problem", "shear", "--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--problem", "shear", "--workers", "0"], "num_threads: expected at least 1, got 0"),
        (["--problem", "shear", "--every", "often"], "every: expected"),
        (["--problem", "shear", "--weight-decay", "0.1"], "--weight-decay: expected none with the optimiser adam"),
        (["--problem", "shear", "--spectrum", "1,2"], "spectrum: expected none with the target 'shear'"),
        (["--problem", "spectrum", "--spectrum", "1,much"], "--spectrum: expected numbers, got 'much'"),
        (["--problem", "shear", "--measures", "sgd-identity"], "did you mean 'sgd_identity'?"),
        (["--methods", "lora-4", "--measures", "orders"], "--measures: expected none with the problem text"),
        (["--problem", "shear", "--samples", "8", "--batch-size", "8"], "batch_size: expected"),
    ],
)
def test_sweep_refuses_what_a_map_cannot_be(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    code, output = call(sweep_door, "--out", tmp_path / "runs", *arguments)
    assert code == 2
    assert complaint in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


def test_sweep_trains_maps_and_tells_each_methods_best_rate(tmp_path: Path) -> None:
    command = [*MAP, "--methods", "lora-2,linchain-1-2-orthogonal", "--learning-rates", "0.0001,0.1,1e6", "--seeds", 2]
    code, output = call(sweep_door, "--out", tmp_path, *command, "--optimizer", "gd", "--scale", "alpha")
    assert code == 0, output
    assert "12 complete runs (0 of them from before)" in output
    runs = [load_run(path.parent) for path in tmp_path.glob("*/manifest.json")]
    assert {run.problem for run in runs} == {"shear-rotation-d8-rank2-gd-scale2-steps60"}
    for method in ("lora-2", "linchain-1-2-orthogonal"):
        row = re.search(rf"^ *{method} +0\.1 +2 +([\d.e-]+) +(\d+)% +([\d.]*) *$", output, re.MULTILINE)
        assert row is not None, output
        final = [run.steps["relative_loss"].iloc[-1] for run in runs if f"{method}_lr0.1_" in run.path.name]
        assert float(row[1]) == pytest.approx(sum(final) / 2, rel=1e-2)  # printed: 3 digits
    assert "It was chosen on the seeds that are shown" in re.sub(r"\s+", " ", output)
    code, output = call(sweep_door, "--out", tmp_path, *command, "--optimizer", "gd", "--scale", "alpha")
    assert code == 0 and "12 complete runs (12 of them from before)" in output
    code, output = call(sweep_door, "--out", tmp_path, *command, "--optimizer", "gd")
    assert code == 2 and "expected scale None, got" not in output and "scale" in output


def test_maps_have_methods_rates_and_seeds_of_their_own(tmp_path: Path) -> None:
    short = ["--problem", "shear", "--dim", 4, "--steps", 2]
    code, output = call(sweep_door, "--out", tmp_path / "grid", *short, "--seeds", 1)
    assert code == 0, output
    assert f"{5 * 14} complete runs" in output
    assert (tmp_path / "grid" / "linchain-4-4_lr6.103515625e-05_seed0" / "manifest.json").is_file()  # r = d, 2^-14
    code, output = call(sweep_door, "--out", tmp_path / "seeds", *short, "--methods", "lora-2", "--optimizer", "gd")
    assert f"{12 * 10} complete runs" in output
    assert (tmp_path / "seeds" / "lora-2_lr16.0_seed9" / "manifest.json").is_file()


def narrow(*arguments: object) -> str:
    """Output of a sweep that succeeds, on a terminal of 80 columns."""
    result = CliRunner(env={"COLUMNS": "80"}).invoke(sweep_door.app, [str(part) for part in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_headings_and_names_stand_whole_in_eighty_columns(tmp_path: Path) -> None:
    methods = "lora-2,linchain-3-2-orthogonal"
    output = narrow("--out", tmp_path, *MAP, "--methods", methods, "--learning-rates", "0.1,1e300", "--seeds", 1)
    lines = output.splitlines()
    above, below = next((a, b) for a, b in pairwise(lines) if b.lstrip().startswith("method"))
    assert above.split() == ["learning", "final", "reached", "at"]
    assert below.split()[:5] == ["method", "rate", "seeds", "relative", "loss"]
    assert "linchain-3-2-orthogonal" in output and "…" not in output
    assert "0.1* " in output  # the best rate, and the smallest
    assert "*: the smallest or largest that was tried, so a better one may lie outside." in " ".join(output.split())


def test_one_run_is_told_in_the_singular(tmp_path: Path) -> None:
    one = ["--methods", "lora-2", "--seeds", 1, "--learning-rates", "0.1"]
    assert "\n1 complete run (0 of them from before)" in narrow("--out", tmp_path, *MAP, *one)


def test_adapters_wider_than_the_map_are_told(tmp_path: Path) -> None:
    few = ["--problem", "shear", "--dim", 2, "--steps", 2, "--seeds", 1, "--learning-rates", "0.1"]
    output = narrow("--out", tmp_path / "wide", *few, "--methods", "lora-2,lora-8,linchain-3-4")
    assert "note: adapters wider than the map of 2 × 2: lora-8, linchain-3-4 (r > 2)" in output
    assert "note:" not in narrow("--out", tmp_path / "default", *few)


def test_the_table_of_a_zero_target_shows_the_excess_loss(tmp_path: Path) -> None:
    zero = ["--problem", "spectrum", "--dim", 6, "--target-rank", 0, "--steps", 20, "--seeds", 2, "--methods", "lora-2"]
    output = narrow("--out", tmp_path / "exact", *zero, "--learning-rates", "0.1")
    assert "not finite" not in output and "excess loss" in output
    assert "The relative loss is undefined in all runs, as it is of the target 0." in " ".join(output.split())
    assert re.search(r"^ lora-2 +0\.1 +2 +0 +100% +1 *$", output, re.MULTILINE)
    noisy = [*zero, "--samples", 4, "--label-noise", 1, "--learning-rates", "0.1"]
    output = narrow("--out", tmp_path / "noisy", *noisy)
    row = re.search(r"^ lora-2 +0\.1 +2 +([\d.e-]+) ", output, re.MULTILINE)
    final = [
        load_run(path.parent).steps["excess_loss"].iloc[-1] for path in (tmp_path / "noisy").glob("*/manifest.json")
    ]
    assert row is not None and float(row[1]) == pytest.approx(sum(final) / 2, rel=1e-2)  # printed: 3 digits


def test_the_level_of_noisy_labels_is_one_below_the_start(tmp_path: Path) -> None:
    noisy = ["--problem", "spectrum", "--dim", 8, "--target-rank", 1, "--samples", 12, "--label-noise", "0.5"]
    rates = ["--learning-rates", "0.003,0.03", "--seeds", 3, "--steps", 300, "--methods", "lora-4,linchain-2-4"]
    output = narrow("--out", tmp_path, *noisy, *rates)
    level = re.search(r"a run that did not reach ([\d.]+)", " ".join(output.split()))
    assert level is not None and 1e-3 < float(level[1]) < 1
    runs = [load_run(path.parent) for path in tmp_path.glob("*/manifest.json")]
    assert min(run.steps["relative_loss"].iloc[-1] for run in runs) > float(level[1])  # fits the noise in the end
    assert "100%" in output or "67%" in output


def test_spectrum_measures_and_weight_decay_of_a_map(tmp_path: Path) -> None:
    one = ["--methods", "lora-3", "--learning-rates", "0.1", "--seeds", 1, "--steps", 3]
    chosen = ["--problem", "spectrum", "--dim", 4, "--spectrum", "1,3,0.5", "--measures", "sgd_identity"]
    narrow("--out", tmp_path / "runs", *chosen, *one, "--optimizer", "adamw", "--weight-decay", "0.25")
    run = load_run(tmp_path / "runs" / "lora-3_lr0.1_seed0")
    settings = run.manifest.extra["settings"]
    assert settings["spectrum"] == [3.0, 1.0, 0.5] and settings["weight_decay"] == 0.25
    assert run.modules["sgd_identity_error"].notna().any()
    assert run.steps["loss"].iloc[0] == pytest.approx((9 + 1 + 0.25) / 2, rel=1e-12)  # ½‖T‖², B being 0
    code, output = call(figures_door, tmp_path / "runs", "--out", tmp_path / "x", "--only", "interaction-ratio")
    assert code == 2 and "by the measure 'orders'" in output and "sweep --measures orders" in output


def test_text_and_maps_are_not_mixed_in_one_folder(small: list[str], tmp_path: Path) -> None:
    one = ["--methods", "lora-2", "--seeds", 1, "--learning-rates", "0.1"]
    assert call(sweep_door, "--out", tmp_path, *MAP, *one)[0] == 0
    code, output = call(sweep_door, "--out", tmp_path, "--methods", "lora-4", "--learning-rates", "0.02", *small)
    assert code == 2 and "a run of shear-rotation-d8-rank2-steps60; choose another folder" in output
    assert not list(tmp_path.glob("lora-4*"))


def test_finetune_sends_maps_to_the_sweep(tmp_path: Path) -> None:
    for name, words in (
        ("shear", "train maps by python -m linchain_analysis.sweep --problem shear"),
        ("hills", "maps: "),
    ):
        code, output = call(finetune_door, "--method", "lora-4", "--out", tmp_path / "run", "--problem", name)
        assert code == 2 and words in output


def test_a_run_of_a_map_is_read_by_the_doors_that_read_runs(tmp_path: Path) -> None:
    one = ["--methods", "lora-2", "--seeds", 1, "--learning-rates", 0.125, "--preset", "full"]
    code, output = call(sweep_door, "--out", tmp_path, *MAP, *one)
    assert code == 0, output
    folder = tmp_path / "lora-2_lr0.125_seed0"
    code, output = call(watch_door, "--once", folder)
    assert code == 0 and "60 of 60" in output and "lora-2 on shear-rotation-d8-rank2-steps60" in output
    code, output = call(audit_door, folder)
    assert code == 0 and "lora-2" in output


@pytest.mark.slow
def test_figures_of_maps_are_drawn(tmp_path: Path) -> None:
    code, output = call(sweep_door, "--out", tmp_path, *MAP, "--methods", "lora-2,moslora-2", "--learning-rates", "0.1")
    assert code == 0, output
    code, output = call(figures_door, tmp_path, "--out", tmp_path / "figures")
    assert code == 0, output
    assert (tmp_path / "figures" / "effective-rank" / "figure.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_of_maps_goes_on_after_its_end(how: signal.Signals, tmp_path: Path) -> None:
    options = ["--problem", "shear-rotation", "--methods", "lora-8", "--seeds", "40", "--learning-rates", "0.01"]
    command = [sys.executable, "-m", "linchain_analysis.sweep", "--out", str(tmp_path), *options, "--steps", "400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("*/manifest.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(how)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how), output
    assert "Traceback" not in output
    before = len(list(tmp_path.glob("*/manifest.json")))
    assert 1 <= before < 40
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"40 complete runs ({before} of them from before)" in done.stdout
    assert all(load_run(path.parent).num_steps == 400 for path in tmp_path.glob("*/manifest.json"))


@pytest.mark.slow
def test_ctrl_c_stops_cleanly(small: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "linchain_analysis.sweep", "--out", str(tmp_path), "--methods", "lora-4"]
    with subprocess.Popen(
        [*command, "--seeds", "2", "--workers", "2", *small, "--steps", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("*/manifest.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does: to the whole group
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "stopped; the same command goes on from here" in output
    assert "Traceback" not in output and "leaked" not in output
    assert {load_run(path.parent).manifest.status for path in tmp_path.glob("*/manifest.json")} == {"interrupted"}


@pytest.mark.skipif(
    not (STORIES.is_dir() and ARC.is_file()), reason="the shared model and data are not beside the checkout"
)
@pytest.mark.parametrize(
    "method",
    [
        "linchain-3-16",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora-16", "moslora-16", "linchain-2-8")),
    ],
)
def test_a_real_model_learns_from_real_data(method: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, output = call(
        finetune_door,
        *("--method", method, "--model", STORIES, "--data", ARC, "--num-eval", "4"),
        *("--learning-rate", "0.01", "--steps", "12", "--batch-size", "4", "--out", out),
    )
    assert code == 0, output
    run = load_run(out)
    assert run.manifest.method == method
    assert run.steps["loss"].iloc[-3:].mean() < 0.9 * run.steps["loss"].iloc[:3].mean()
    losses = run.evals[run.evals["metric"] == "loss"].set_index("step")["value"]
    assert losses.loc[12] < 0.9 * losses.loc[0]
    assert (run.modules.groupby("step")["effective_rank"].min().loc[2:] > 1).all()
