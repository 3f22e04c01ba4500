"""What is written comes back, live and complete."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import small_runs
from safetensors.numpy import load_file

from linchain_analysis.benchmarks import reading
from linchain_analysis.errors import DamageError, InputError, RunError
from linchain_analysis.runs import (
    SCHEMA_VERSION,
    Manifest,
    RunWriter,
    append_evals,
    find_runs,
    load_run,
    load_runs,
    save_start,
)
from linchain_analysis.runs import complete as completing
from linchain_analysis.runs.lock import LOCK
from linchain_analysis.vocabulary import columns_of

FRAMES = ("steps", "modules", "factors", "links", "evals")


@pytest.mark.parametrize("close", [True, False])
def test_tables_come_back(tmp_path: Path, close: bool) -> None:
    small_runs.write_run(tmp_path / "run", close=close)
    run = load_run(tmp_path / "run")
    assert run.status == ("complete" if close else "running")
    assert (run.method, run.num_steps) == ("moslora-2", 3)
    assert run.steps["step"].tolist() == [1, 2, 3]
    assert run.steps["loss"].tolist() == [10.0, 5.0, 10.0 / 3]
    assert run.steps["epoch"].isna().all()
    first = run.modules[run.modules["module"] == small_runs.NAMES[0]]
    np.testing.assert_allclose(first["spectrum"].tolist(), [[3, 1], [6, 2], [9, 3]])
    # by hand: σ = 3 : 1, p = 3/4, 1/4
    erank = math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    np.testing.assert_allclose(first["effective_rank"], erank, rtol=1e-7)
    np.testing.assert_allclose(first["stable_rank"], 10 / 9, rtol=1e-7)
    np.testing.assert_allclose(first["delta_norm"], np.sqrt(10) * np.array([1, 2, 3]), rtol=1e-7)
    np.testing.assert_allclose(first["delta_spectral_norm"], [3, 6, 9], rtol=1e-7)
    assert first["kind"].tolist() == ["q_proj"] * 3
    assert first["layer"].tolist() == [0] * 3
    zero = run.modules[run.modules["module"] == small_runs.NAMES[1]]
    assert (zero["delta_norm"] == 0).all()
    assert zero["effective_rank"].isna().all()
    expected = np.linalg.norm(np.random.default_rng(2).random(4).astype(np.float32))
    assert first["delta_update_norm"].iloc[1] == pytest.approx(float(expected), rel=1e-6)
    assert run.factors["factor"].tolist()[:6] == ["A", "W1", "B"] * 2
    assert run.factors["update_ratio"].isna().all()
    assert run.evals.values.tolist() == [[3, "eval", "accuracy", 0.5]]
    assert len(run.links) == 0
    for table in FRAMES:
        defined = [column.name for column in columns_of(table)]
        assert [name for name in getattr(run, table).columns if name in defined] == defined


def test_live_and_complete_frames_are_the_same(tmp_path: Path) -> None:
    small_runs.write_run(tmp_path / "live", close=False)
    small_runs.write_run(tmp_path / "complete")
    live, complete = load_run(tmp_path / "live"), load_run(tmp_path / "complete")
    for table in FRAMES:
        pd.testing.assert_frame_equal(getattr(live, table), getattr(complete, table), check_exact=True)
    assert not list((tmp_path / "complete").glob("*.arrows"))


def write_odd_spectra(path: Path) -> RunWriter:
    """Spectra of no length, of zeros, of NaN, too large to square in float32, none with and without norms."""
    spectra = [[3.0, 1.0], [], [0.0, 0.0], [np.nan, np.nan], [1e38, 1e38], None, None]
    length = len(spectra)
    writer = RunWriter(path, small_runs.manifest())
    for step in (1, 2):
        writer.append(
            "modules",
            {
                "step": [step] * length,
                "module": [small_runs.NAMES[0]] * length,
                "spectrum": spectra,
                "delta_update_spectrum": spectra[::-1],
                "delta_norm": [np.nan] * 5 + [0.1, np.nan],
            },
        )
        writer.append("steps", {"step": [step]})
    return writer


def test_derived_columns_are_the_same_before_and_after_completion(tmp_path: Path) -> None:
    writer = write_odd_spectra(tmp_path / "run")
    live = load_run(tmp_path / "run")
    before = {"all": live.modules, "some": live.read("modules", ["delta_norm", "step", "participation_ratio"])}
    writer.close()
    complete = load_run(tmp_path / "run")
    pd.testing.assert_frame_equal(before["all"], complete.modules, check_exact=True)
    some = complete.read("modules", ["delta_norm", "step", "participation_ratio"])
    pd.testing.assert_frame_equal(before["some"], some, check_exact=True)
    first = complete.modules.iloc[:7]
    tenth = float(np.float32(0.1))  # as it was stored
    np.testing.assert_allclose(first["delta_norm"], [10**0.5, 0, 0, np.nan, 2**0.5 * 1e38, tenth, np.nan], rtol=1e-7)
    np.testing.assert_allclose(first["stable_rank"], [10 / 9, np.nan, np.nan, np.nan, 2, np.nan, np.nan], rtol=1e-7)


def test_derived_columns_are_stored_when_a_run_is_completed(tmp_path: Path) -> None:
    write_odd_spectra(tmp_path / "run").close()
    run = load_run(tmp_path / "run")
    stored = pq.read_table(tmp_path / "run" / "modules.parquet")
    derived = [column.name for column in columns_of("modules") if column.derived and column.kind == "float"]
    assert sorted(run.manifest.tables["modules"]["derived"]) == sorted(derived)
    for name in derived:
        np.testing.assert_array_equal(stored[name].to_numpy(), run.modules[name])
    # Null where nothing was taken; NaN where a spectrum has no rank.
    assert stored["effective_rank"].is_null().to_pylist() == [False] * 5 + [True] * 2 + [False] * 5 + [True] * 2


def test_a_file_without_derived_columns_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_odd_spectra(tmp_path / "new").close()
    monkeypatch.setattr(completing, "add_derived", lambda rows: (rows, []))
    write_odd_spectra(tmp_path / "old").close()
    old, new = load_run(tmp_path / "old"), load_run(tmp_path / "new")
    assert "derived" not in old.manifest.tables["modules"]
    pd.testing.assert_frame_equal(old.modules, new.modules, check_exact=True)
    columns = ["module", "effective_rank", "kind"]
    pd.testing.assert_frame_equal(old.read("modules", columns), new.read("modules", columns), check_exact=True)


@pytest.mark.parametrize("close", [True, False])
def test_steps_with_gaps_leave_the_rows_between_out(tmp_path: Path, close: bool) -> None:
    writer = RunWriter(tmp_path / "run", small_runs.manifest())
    for step in range(1, 6):
        small_runs.append_step(writer, step, with_steps_row=step not in (2, 5))
    if close:
        writer.close()
    assert load_run(tmp_path / "run").modules["step"].tolist() == [1, 1, 3, 3, 4, 4]


def test_floats_are_stored_split_and_what_repeats_as_a_dictionary(tmp_path: Path) -> None:
    num_modules, num_steps = 40, 60
    folder = reading.write_run(tmp_path / "run", num_modules, num_steps)
    for table in ("modules", "factors"):
        group = pq.ParquetFile(folder / f"{table}.parquet").metadata.row_group(0)
        for column in map(group.column, range(group.num_columns)):
            wanted = "BYTE_STREAM_SPLIT" if column.physical_type == "FLOAT" else "RLE_DICTIONARY"
            assert wanted in column.encodings, column.path_in_schema
            assert ("RLE_DICTIONARY" in column.encodings) == (wanted == "RLE_DICTIONARY")
    size = sum(file.stat().st_size for file in folder.glob("*.parquet"))
    assert size / (num_modules * num_steps) < 330


def test_what_was_written_is_counted(tmp_path: Path) -> None:
    writer = small_runs.write_run(tmp_path / "run", close=False)
    writer.update_manifest(extra={"note": "x" * 1000})
    files = [file for file in (tmp_path / "run").iterdir() if file.name != LOCK]
    assert writer.bytes_written == sum(file.stat().st_size for file in files)


def test_rows_of_an_unfinished_step_are_dropped(tmp_path: Path) -> None:
    writer = small_runs.write_run(tmp_path / "run", close=False)
    small_runs.append_step(writer, 4, with_steps_row=False)
    assert load_run(tmp_path / "run").modules["step"].max() == 3
    writer.close("failed", "no reason")
    run = load_run(tmp_path / "run")
    assert (run.status, run.manifest.message) == ("failed", "no reason")
    assert run.modules["step"].max() == run.factors["step"].max() == 3


def test_columns_can_be_read_alone(tmp_path: Path) -> None:
    small_runs.write_run(tmp_path / "run")
    run = load_run(tmp_path / "run")
    part = run.read("modules", ["step", "kind", "effective_rank"])
    pd.testing.assert_frame_equal(part, run.modules[["step", "kind", "effective_rank"]])
    assert run.read("factors", ["update_norm"]).columns.tolist() == ["update_norm"]
    with pytest.raises(InputError, match="got effective_rnak"):
        run.read("modules", ["effective_rnak"])
    with pytest.raises(InputError, match="got 'moduls'"):
        run.read("moduls")


def test_scalars_join_steps_and_override(tmp_path: Path) -> None:
    writer = small_runs.write_run(tmp_path / "run", close=False)
    rows = [
        (1, "loss", 7.0),
        (2, "reward", 1.0),
        (2, "reward", 2.0),
        (3, "reward", 3.0),
        (3, "reward", math.nan),
        (9, "loss", 0.0),
    ]
    writer.append("scalars", dict(zip(("step", "name", "value"), map(list, zip(*rows, strict=True)), strict=True)))
    for run in (load_run(tmp_path / "run"), (writer.close(), load_run(tmp_path / "run"))[1]):
        assert run.steps["loss"].tolist() == [7.0, 5.0, 10.0 / 3]
        np.testing.assert_array_equal(run.steps["reward"], [math.nan, 2.0, math.nan])


def test_many_runs_are_one_table(tmp_path: Path) -> None:
    small_runs.write_run(tmp_path / "grid" / "a" / "seed0", init_seed=0, base_learning_rate=0.1)
    small_runs.write_run(tmp_path / "grid" / "b" / "seed0", init_seed=1, method="lora-2", close=False)
    assert [path.parent.name for path in find_runs(tmp_path)] == ["a", "b"]
    runs = load_runs([tmp_path / "grid"])
    assert len(runs) == 2
    labels = ["run", "method", "problem", "base_learning_rate", "init_seed", "data_seed"]
    for table in FRAMES:
        assert getattr(runs, table).columns[:6].tolist() == labels
    assert runs.steps.groupby("run", observed=True)["step"].count().to_dict() == {"a/seed0": 3, "b/seed0": 3}
    assert runs.modules["method"].unique().tolist() == ["moslora-2", "lora-2"]
    assert runs.catalogue[["run", "status", "num_steps"]].values.tolist() == [
        ["a/seed0", "complete", 3],
        ["b/seed0", "running", 3],
    ]
    assert runs.read("modules", ["effective_rank"]).columns.tolist() == [*labels, "effective_rank"]
    assert runs.modules["module"].dtype == "category"
    twice = load_runs([tmp_path / "grid" / "a", load_run(tmp_path / "grid" / "a" / "seed0")])
    assert len(twice) == 1


def test_runs_of_other_modules_and_labels_are_one_table(tmp_path: Path) -> None:
    small_runs.write_run(tmp_path / "a", init_seed=0, problem="sums")
    records = tuple(replace(record, module=f"other.{record.kind}") for record in small_runs.manifest().modules)
    writer = RunWriter(tmp_path / "b", small_runs.manifest(modules=records, method=None))
    writer.append("modules", {"step": [1], "module": ["other.up_proj"], "spectrum": [[2.0]]})
    writer.append("steps", {"step": [1]})
    RunWriter(tmp_path / "c", Manifest(command=("x",)))  # has nothing yet
    runs = load_runs(tmp_path)
    modules = runs.modules
    assert modules["run"].tolist() == ["a"] * 6 + ["b"]
    assert modules["module"].tolist() == list(small_runs.NAMES) * 3 + ["other.up_proj"]
    assert modules["kind"].tolist() == ["q_proj", "up_proj"] * 3 + ["up_proj"]
    assert modules["layer"].tolist() == [0, 1] * 3 + [1]
    assert modules["method"].tolist() == ["moslora-2"] * 6 + [np.nan]
    assert modules["problem"].tolist() == ["sums"] * 6 + [np.nan]
    assert modules["init_seed"].tolist()[:6] == [0] * 6 and modules["init_seed"].isna().tolist()[6]
    assert all(modules[name].dtype == "category" for name in ("run", "method", "problem", "module", "kind"))
    assert modules["effective_rank"].iloc[6] == 1.0
    assert load_runs(tmp_path / "c").factors.empty


def test_evaluations_can_follow_the_end(tmp_path: Path) -> None:
    small_runs.write_run(tmp_path / "run")
    for value in (0.25, 0.75):
        append_evals(tmp_path / "run", {"step": [3], "split": ["test"], "metric": ["f1"], "value": [value]})
    assert load_run(tmp_path / "run").evals["value"].tolist() == [0.5, 0.25, 0.75]
    assert len(list((tmp_path / "run").glob("evals*"))) == 1


def test_initial_factors_are_kept(tmp_path: Path) -> None:
    writer = small_runs.write_run(tmp_path / "run", close=False)
    save_start(writer.path, {"m/A": np.arange(6.0).reshape(2, 3).T}, {})
    kept = load_file(tmp_path / "run" / "initial_factors.safetensors")
    np.testing.assert_array_equal(kept["m/A"], np.arange(6.0).reshape(2, 3).T)


def test_a_folder_is_one_run_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.txt").write_text("mine")
    small_runs.write_run(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.txt").read_text() == "mine"
    with pytest.raises(RunError, match=r"got manifest\.json"):
        RunWriter(tmp_path / "run", small_runs.manifest())


def test_wrong_rows_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    writer = small_runs.write_run(tmp_path / "run", close=False)
    with pytest.raises(RunError, match="a module of the manifest, got 'elsewhere'"):
        writer.append("modules", {"step": [4], "module": ["elsewhere"]})
    with pytest.raises(RunError, match=r"unknown \['los'\]"):
        writer.append("steps", {"step": [4], "los": [1.0]})
    with pytest.raises(RunError, match="lengths"):
        writer.append("steps", {"step": [4, 5], "loss": [1.0]})
    with pytest.raises(RunError, match="got 'stpes'"):
        writer.append("stpes", {"step": [4]})
    writer.close()
    writer.close()
    with pytest.raises(RunError, match="a closed one"):
        writer.append("steps", {"step": [4]})
    assert load_run(tmp_path / "run").num_steps == 3


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"no manifest\.json"):
        load_run(tmp_path)
    with pytest.raises(RunError, match="none under it"):
        load_runs([tmp_path])
    with pytest.raises(InputError, match="got 'ignore'"):
        load_run(tmp_path, damaged="ignore")


def test_a_newer_schema_is_refused_with_the_version_to_install(tmp_path: Path) -> None:
    writer = small_runs.write_run(tmp_path / "run", close=False)
    writer.update_manifest(schema_version=SCHEMA_VERSION + 1, packages={"linchain-analysis": "9.8.7"})
    with pytest.raises(RunError, match=r"9\.8\.7"):
        load_run(tmp_path / "run")


def test_a_manifest_that_was_touched_is_damage(tmp_path: Path) -> None:
    small_runs.write_run(tmp_path / "run")
    path = tmp_path / "run" / "manifest.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "init_seed": 5}))
    with pytest.raises(DamageError, match="a wrong checksum"):
        load_run(tmp_path / "run")
    path.write_text(path.read_text()[:50])
    with pytest.raises(DamageError, match="intact manifest"):
        load_run(tmp_path / "run")


def test_a_run_killed_while_it_is_completed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet files but no manifest that names them: the streams are still what counts."""
    writer = small_runs.write_run(tmp_path / "run", close=False)

    def die(**changes: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "update_manifest", die)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    run = load_run(tmp_path / "run")
    assert (run.status, run.num_steps, len(run.factors)) == ("running", 3, 18)
