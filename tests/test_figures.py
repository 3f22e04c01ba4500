"""The door `python -m linchain_analysis.figures`, from run folders to files."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from synthetic_runs import FrameRuns, comparison, write_comparison
from typer.testing import CliRunner, Result

from linchain_analysis.figures import app
from linchain_analysis.plots import plot_loss, plot_overview
from linchain_analysis.runs import Manifest, ModuleRecord, RunWriter, load_runs

FILES = {"figure.pdf", "figure.png", "drawn.csv", "caption.txt", "provenance.json"}
SINGLE = {"loss", "effective-rank", "gradient-norms", "update-norms"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison") / "runs"
    write_comparison(folder, comparison(num_seeds=2, num_steps=8))
    return folder


def _draw(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_figure_has_its_five_files(runs: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "linchain_analysis.figures", str(runs), "--out", "figures"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"drawn: {folder}"
        for folder in (
            "figures",
            *(f"figures/{name}" for name in ("loss", "effective-rank", "gradient-norms", "update-norms")),
        )
    ]
    for name in ("", *SINGLE):
        assert {file.name for file in (tmp_path / "figures" / name).iterdir() if file.is_file()} == FILES
    provenance = json.loads((tmp_path / "figures" / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["command"][:3] == ["python", "-m", "linchain_analysis.figures"]
    assert provenance["command"][-2:] == ["--out", "figures"]
    assert provenance["git"] is None
    assert len(provenance["runs"]) == 8
    first = provenance["runs"][0]
    assert not Path(first["path"]).is_absolute()
    assert (tmp_path / first["path"] / "manifest.json").is_file()
    assert (first["method"], first["init_seed"], first["problem"]) == ("linchain-2-8", 0, "sums")
    assert len({run["sha256"] for run in provenance["runs"]}) == 8
    assert {"loss", "grad_norm", "update_norm", "effective_rank"} <= {one["name"] for one in provenance["columns"]}
    assert "95 % t interval" in provenance["caption"]
    assert (tmp_path / "figures" / "caption.txt").read_text(encoding="utf-8") == provenance["caption"] + "\n"


def test_the_csv_is_what_was_drawn(runs: Path, tmp_path: Path) -> None:
    assert _draw(runs, "--out", tmp_path, "--only", "overview,loss").exit_code == 0
    for folder, plot in (("", plot_overview), ("loss", plot_loss)):
        read = pd.read_csv(tmp_path / folder / "drawn.csv")
        pd.testing.assert_frame_equal(
            read, plot(load_runs(runs)).table, check_dtype=False, check_categorical=False, check_exact=True
        )
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["loss"]


def test_drawing_again_gives_the_same_bytes_in_another_process(runs: Path, tmp_path: Path) -> None:
    options = ["--only", "overview", "--format", "pdf,png"]
    for name, seed in (("a", "1"), ("b", "2")):
        subprocess.run(
            [sys.executable, "-m", "linchain_analysis.figures", str(runs), "--out", str(tmp_path / name), *options],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
    for file in ("figure.pdf", "figure.png", "drawn.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_runs_without_spectra_still_give_the_other_figures(tmp_path: Path) -> None:
    whole = comparison(num_seeds=1, num_steps=4)
    without = {name: frame for name, frame in whole.tables.items() if name != "modules"}
    write_comparison(tmp_path / "runs", FrameRuns(**without), preset="light")
    done = _draw(tmp_path / "runs", "--out", tmp_path / "figures", "--format", "png")
    assert done.exit_code == 0
    assert "left out: effective-rank: expected finite values" in done.stderr
    assert {path.name for path in (tmp_path / "figures").iterdir() if path.is_dir()} == SINGLE - {"effective-rank"}
    only = _draw(tmp_path / "runs", "--out", tmp_path / "rank", "--only", "effective-rank")
    assert only.exit_code == 1
    assert not (tmp_path / "rank").exists()


def test_learning_rates_are_drawn_apart(runs: Path, tmp_path: Path) -> None:
    faster = comparison(num_seeds=1, num_steps=4)
    for frame in faster.tables.values():
        frame["base_learning_rate"] = 0.01
        frame["run"] = frame["run"].str.replace("0.001", "0.01")
    write_comparison(tmp_path / "faster", faster)
    done = _draw(runs, tmp_path / "faster", "--out", tmp_path / "figures", "--only", "loss", "--format", "png")
    assert done.exit_code == 0
    for name, num_seeds in (("sums-lr0.001", 2), ("sums-lr0.01", 1)):
        drawn = pd.read_csv(tmp_path / "figures" / name / "loss" / "drawn.csv")
        assert set(drawn["num_seeds"]) == {num_seeds}


def test_a_run_that_is_not_complete_is_named(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    name = "sums-lora-16_lr0.001_seed0"
    shutil.rmtree(tmp_path / "runs" / name)
    writer = RunWriter(
        tmp_path / "runs" / name,
        Manifest(("t",), method="lora-16", problem="sums", base_learning_rate=1e-3, init_seed=0, data_seed=0),
    )
    writer.append("steps", {"step": [1, 2], "loss": [1.0, 1.0]})
    done = _draw(tmp_path / "runs", "--out", tmp_path / "figures", "--only", "loss", "--format", "png")
    writer.close()
    assert done.exit_code == 0
    assert f"drawn as far as they got: {name} (running)" in done.stderr
    caption = json.loads((tmp_path / "figures" / "loss" / "provenance.json").read_text(encoding="utf-8"))["caption"]
    assert f"lora-16 is drawn up to step 2, where its shortest run ({name}) ends; others go to 8." in caption


def test_wrong_names_are_refused_with_those_that_the_runs_offer(runs: Path, tmp_path: Path) -> None:
    wrong = _draw(runs, "--out", tmp_path / "x", "--only", "loss,spectra")
    assert wrong.exit_code == 2
    assert "--only: expected names among overview, loss, effective-rank" in wrong.stderr
    assert "participation-ratio" in wrong.stderr
    assert "got 'spectra'" in wrong.stderr
    assert not (tmp_path / "x").exists()


def test_a_wrong_format_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    wrong = _draw(tmp_path / "missing", "--out", tmp_path / "x", "--format", "jpg")
    assert wrong.exit_code == 2
    assert "--format: expected names among pdf, png, got 'jpg'" in wrong.stderr


def _write_measured(folder: Path) -> None:
    """Runs that hold a column of this package and one that only its author knows."""
    for seed in (0, 1):
        manifest = Manifest(
            ("train",),
            method="lora-2",
            problem="sums",
            base_learning_rate=1e-3,
            init_seed=seed,
            data_seed=seed,
            modules=(ModuleRecord("q", "q", 0, "default", 4, 4, 1.0, (("A", (4, 2)), ("B", (2, 4)))),),
            columns={"modules": [("interaction_ratio", "float"), ("my_own", "float")]},
        )
        writer = RunWriter(folder / f"seed{seed}", manifest)
        writer.append(
            "modules", {"step": [1, 2], "module": ["q"] * 2, "interaction_ratio": [0.1, 0.2], "my_own": [3, 4]}
        )
        writer.append("steps", {"step": [1, 2], "loss": [2.0, 1.0]})
        writer.close()


def test_every_measured_column_has_a_folder_of_its_own(tmp_path: Path) -> None:
    _write_measured(tmp_path / "runs")
    done = _draw(tmp_path / "runs", "--out", tmp_path / "figures")
    assert done.exit_code == 0, done.output
    for name in ("interaction-ratio", "my-own"):
        assert f"drawn: {tmp_path / 'figures' / name}" in done.stdout
        assert {file.name for file in (tmp_path / "figures" / name).iterdir()} == FILES
    provenance = json.loads((tmp_path / "figures" / "interaction-ratio" / "provenance.json").read_text("utf-8"))
    assert [column["name"] for column in provenance["columns"]] == ["step", "module", "interaction_ratio"]
    assert len(provenance["runs"]) == 2
    assert pd.read_csv(tmp_path / "figures" / "my-own" / "drawn.csv")["mean"].tolist() == [3.0, 4.0]


def test_columns_without_values_share_one_line_and_tell_more_when_they_are_named(tmp_path: Path) -> None:
    columns = [("noise_scale", "float"), ("noise_trace", "float")]
    manifest = Manifest(
        ("train",), method="lora-2", problem="sums", init_seed=0, data_seed=0, columns={"steps": columns}
    )
    writer = RunWriter(tmp_path / "runs" / "seed0", manifest)
    writer.append("steps", {"step": [1, 2], "loss": [2.0, 1.0], **{name: [math.nan] * 2 for name, _ in columns}})
    writer.close()
    options = ["--format", "png", "--out", tmp_path / "figures"]
    lines = _draw(tmp_path / "runs", *options).stderr.splitlines()
    assert [line for line in lines if "noise" in line] == ["left out: noise-scale, noise-trace: no value at any step"]
    named = _draw(tmp_path / "runs", *options, "--only", "noise-scale").stderr
    assert "left out: noise-scale: expected finite values" in named
    assert "see when it is known" in named


def test_columns_are_drawn_by_name(runs: Path, tmp_path: Path) -> None:
    options = ["--only", "participation-ratio,delta_norm", "--format", "png"]
    assert _draw(runs, "--out", tmp_path, *options).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"participation-ratio", "delta-norm"}


def test_a_column_that_one_comparison_lacks_is_drawn_for_the_others(tmp_path: Path) -> None:
    _write_measured(tmp_path / "runs")
    # The same method at another rate, and without the measure: a comparison of its own.
    writer = RunWriter(
        tmp_path / "runs" / "faster",
        Manifest(("t",), method="lora-2", problem="sums", base_learning_rate=1e-2, init_seed=0, data_seed=0),
    )
    writer.append("steps", {"step": [1, 2], "loss": [2.0, 1.0]})
    writer.close()
    done = _draw(tmp_path / "runs", "--out", tmp_path / "figures", "--only", "my-own", "--format", "png")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [f"drawn: {tmp_path / 'figures' / 'sums-lr0.001' / 'my-own'}"]
    assert "left out: my-own: expected a column of these runs" in done.stderr


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_folder_without_runs_is_refused_by_name(name: str, tmp_path: Path) -> None:
    done = _draw(tmp_path / name, "--out", tmp_path / "x")
    assert done.exit_code == 2
    assert str(tmp_path / name) in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two methods at four learning rates, of which the third is the best."""
    folder = tmp_path_factory.mktemp("sweep") / "runs"
    for place, method in enumerate(("lora-2", "moslora-2")):
        for rate, speed in ((0.125, 0.1), (0.25, 0.3), (0.5, 1.0), (1.0, 0.2)):
            for seed in (0, 1):
                manifest = Manifest(
                    ("t",),
                    method=method,
                    problem="shear",
                    base_learning_rate=rate,
                    init_seed=seed,
                    data_seed=seed,
                    modules=(ModuleRecord("map", "map", 0, "default", 2, 2, 1.0, (("A", (2, 2)), ("B", (2, 2)))),),
                )
                writer = RunWriter(folder / f"{method}_lr{rate}_seed{seed}", manifest)
                losses = [math.exp(-speed * step / (1 + place + seed)) for step in range(1, 11)]
                spectra = [[1.0, 0.1 * step] for step in range(1, 11)]
                steps = list(range(1, 11))
                writer.append("modules", {"step": steps, "module": ["map"] * 10, "spectrum": spectra})
                writer.append("scalars", {"step": steps, "name": ["relative_loss"] * 10, "value": losses})
                writer.append("steps", {"step": steps, "loss": losses})
                writer.close()
    return folder


def test_a_sweep_over_rates_is_one_figure_and_the_others_show_each_method_at_its_best(
    sweep: Path, tmp_path: Path
) -> None:
    done = _draw(sweep, "--out", tmp_path, "--format", "png", "--level", "0.2")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"drawn: {tmp_path}", f"drawn: {tmp_path / 'best'}"]
    rates = pd.read_csv(tmp_path / "drawn.csv")
    over = rates[rates["part"] == "a-c"]
    assert over["base_learning_rate"].nunique() == 4
    assert set(over["quantity"]) == {"steps to 0.2 of relative_loss"}
    # Seeds divide the speed by 1 and 2: exp(−s) ≤ 0.2 from s = 2 on, exp(−s/2) from 4 on.
    fastest = over[(over["method"] == "lora-2") & (over["base_learning_rate"] == 0.5)]
    assert fastest["median"].tolist() == [3.0]
    provenance = json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8"))
    assert len(provenance["runs"]) == 16
    best = json.loads((tmp_path / "best" / "loss" / "provenance.json").read_text(encoding="utf-8"))
    assert {run["base_learning_rate"] for run in best["runs"]} == {0.5}
    assert "Each method at its own learning rate: lora-2 0.5, moslora-2 0.5;" in best["caption"]
    assert "at most 0.2" in provenance["caption"]


def test_figures_of_a_sweep_are_drawn_by_name(sweep: Path, tmp_path: Path) -> None:
    options = ["--format", "png", "--out", tmp_path]
    assert _draw(sweep, *options, "--only", "learning-rates").stdout.splitlines() == [
        f"drawn: {tmp_path / 'learning-rates'}"
    ]
    both = _draw(sweep, *options, "--only", "loss,learning-rates").stdout.splitlines()
    assert both == [f"drawn: {tmp_path / 'learning-rates'}", f"drawn: {tmp_path / 'best' / 'loss'}"]


def test_a_sweep_is_drawn_rate_by_rate_on_request(sweep: Path, tmp_path: Path) -> None:
    done = _draw(sweep, "--out", tmp_path, "--format", "png", "--each-rate", "--only", "loss")
    assert done.exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"shear-lr{rate}" for rate in ("0.125", "0.25", "0.5", "1")}


def test_a_sweep_of_two_problems_has_a_folder_for_each(sweep: Path, runs: Path, tmp_path: Path) -> None:
    done = _draw(sweep, runs, "--out", tmp_path, "--format", "png", "--only", "loss")
    assert done.stdout.splitlines() == [
        f"drawn: {tmp_path / 'shear' / 'best' / 'loss'}",
        f"drawn: {tmp_path / 'sums' / 'loss'}",
    ]
