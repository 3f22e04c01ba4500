"""What a run folder holds after writing, after faults and after a kill at any moment of `close`."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from runs.make_schema_run import MANIFEST, NAMES, PROCESS, snapshot_cores, write_next_part, write_run, write_step

from linchain_analysis.errors import RunError
from linchain_analysis.runs import SCHEMA_VERSION, Manifest, Run, RunWriter, load_run, load_runs, read_snapshots
from linchain_analysis.runs import complete as completing
from linchain_analysis.runs import writer as writing

TABLES = ("steps", "modules", "factors", "links", "evals", "snapshots", "health")
HEALTH = ["step", "finding", "subject", "began", "message"]
DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("form", ["complete", "killed"])
def test_a_run_of_any_schema_version_reads_as_it_was_written(version: int, form: str) -> None:
    run = load_run(DATA / f"schema-{version}" / form)
    assert run.manifest.schema_version == version
    assert run.status == ("complete" if form == "complete" else "running")
    assert (run.method, run.init_seed, run.data_seed) == ("moslora-2", 1, 2)
    assert run.steps["loss"].tolist() == [1.0, 7.0, 1 / 3]  # `log` overrode the second
    assert np.isnan(run.steps["aux"].to_numpy()[[0, 2]]).all()
    measured = run.modules[run.modules["module"] == NAMES[0]]
    assert measured["step"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(measured["delta_norm"], [5.0, 10.0, 15.0], rtol=1e-12)
    np.testing.assert_allclose(measured["stable_rank"], 25 / 16, rtol=1e-12)
    np.testing.assert_allclose(measured["delta_update_effective_rank"], 2.0, rtol=1e-12)
    refused = run.modules[run.modules["module"] == NAMES[1]]
    assert refused["delta_norm"].isna().all()
    assert refused["descent_cosine"].tolist() == [-0.25] * 3
    whole = 3 if form == "complete" else 2  # the kill cut the third step's factors
    assert run.factors["grad_norm"].tolist() == [s + p / 8 for s in range(1, whole + 1) for p in range(6)]
    assert run.evals["value"].tolist() == [0.125]
    if version < 2:
        assert run.links.empty and run.read("snapshots").empty
        return
    assert run.manifest.measures == ("orders", "balance")
    assert measured["first_order_share"].tolist() == [0.875, 0.75, 0.625]
    assert [ratios.tolist() for ratios in measured["order_ratios"]] == [[1.0, s / 4, 0.125] for s in (1, 2, 3)]
    assert refused["first_order_share"].isna().all() and refused["order_ratios"].isna().all()
    assert run.links["link"].tolist() == ["A-W1", "W1-B"] * 3
    assert run.links["balance_drift"].tolist() == [s / d for s in (1, 2, 3) for d in (16, 32)]
    (snapshot,) = read_snapshots(run)
    assert (snapshot.step, snapshot.modules) == (2, [NAMES[0]])
    expected = snapshot_cores()
    assert (snapshot.cores.size, snapshot.cores.epsilon) == (expected.size, 2.0**-23)
    assert snapshot.cores.tokens is None and snapshot.cores.since_start is None
    for name in ("scale", "learning_rate", "before", "change", "gradient"):
        for found, known in zip(getattr(snapshot.cores, name), getattr(expected, name), strict=True):
            np.testing.assert_array_equal(found, known)
    np.testing.assert_array_equal(snapshot.whole_gradients[NAMES[0]]["W1"], [[0.0, 1.0], [np.nan, 3.0]])
    if version < 3:
        assert run.health.empty and run.health.columns.tolist() == HEALTH
        assert run.manifest.process is None
        return
    assert run.health.to_dict("list") == {
        "step": [1, 3],
        "finding": ["spike"] * 2,
        "subject": ["loss"] * 2,
        "began": [True, False],
        "message": ["loss rose", "loss is as before"],
    }
    assert run.manifest.process == PROCESS and run.manifest.segments == ()


def test_a_resumed_run_of_schema_3_reads_as_it_was_written() -> None:
    run = load_run(DATA / "schema-3" / "resumed")
    check_resumed(run)
    assert (run.manifest.schema_version, run.status, run.is_alive) == (3, "complete", False)
    (segment,) = run.manifest.segments
    assert (segment.number, segment.last_step, segment.num_steps, segment.status) == (1, 2, 2, "running")
    assert (segment.command, segment.preset, segment.measures) == (("train.py",), "standard", ("orders", "balance"))


def check_resumed(run: Run) -> None:
    """What `write_run` of three steps and `write_next_part` make together."""
    assert run.num_steps == 4
    assert run.steps["step"].tolist() == [1, 2, 3, 4]
    assert run.steps["loss"].tolist() == [1.0, 7.0, 6.0, 8.0]
    np.testing.assert_array_equal(run.steps["aux"], [np.nan, 8.0, np.nan, 16.0])
    assert run.steps["skipped"].tolist() == [False, False, True, True]
    measured = run.modules[run.modules["module"] == NAMES[0]]
    assert measured["step"].tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(measured["delta_norm"], [5.0, 10.0, 24.0, 32.0], rtol=1e-12)
    np.testing.assert_allclose(measured["stable_rank"], [25 / 16, 25 / 16, np.nan, np.nan], rtol=1e-12)
    np.testing.assert_array_equal(measured["first_order_share"], [0.875, 0.75, np.nan, np.nan])
    np.testing.assert_array_equal(measured["second_share"], [np.nan, np.nan, 0.375, 0.5])
    assert measured["kind"].tolist() == ["q_proj"] * 4 and measured["layer"].tolist() == [0] * 4
    assert run.modules[run.modules["module"] == NAMES[1]]["step"].tolist() == [1, 2]
    assert run.factors["grad_norm"].tolist() == [s + p / 8 for s in (1, 2) for p in range(6)]
    assert run.links["step"].tolist() == [1, 1, 2, 2]
    assert run.evals[["step", "value"]].values.tolist() == [[0, 0.25], [2, 0.5]]
    assert run.health[["step", "finding", "began"]].values.tolist() == [[1, "spike", True], [4, "idle", True]]
    (snapshot,) = read_snapshots(run)
    assert snapshot.step == 2
    manifest = run.manifest
    assert (manifest.started, manifest.resumed) == ("2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00")
    assert (manifest.init_seed, manifest.command, manifest.preset) == (1, ("train.py", "--resume"), "light")
    assert (manifest.packages, manifest.measures) == ({"linchain-analysis": "0.2.0"}, ("balance",))


def test_every_schema_version_is_kept() -> None:
    assert sorted(path.name for path in DATA.iterdir()) == [f"schema-{n}" for n in range(1, SCHEMA_VERSION + 1)]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_kill_anywhere_in_close_leaves_the_run_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    class Killed(BaseException):
        pass

    def write(path: Path) -> RunWriter:
        first = write_run(path, 3)
        if resumed:
            first.close()
            return write_next_part(path)
        return first

    write(tmp_path / "intact").close()
    whole = {table: load_run(tmp_path / "intact").read(table) for table in TABLES}
    num_calls = 0
    moments = [(completing, "write_parquet"), (writing, "write_manifest"), (Path, "unlink")]
    for kill_at in range(1, 100):
        writer = write(tmp_path / "run")
        num_calls = 0
        with monkeypatch.context() as patch:
            for owner, name in moments:
                original = getattr(owner, name)

                def counted(*args: Any, original: Any = original, last: int = kill_at, **kwargs: Any) -> Any:
                    nonlocal num_calls
                    num_calls += 1
                    if num_calls == last:
                        raise Killed
                    return original(*args, **kwargs)

                patch.setattr(owner, name, counted)
            try:
                writer.close()
                killed = False
            except Killed:
                killed = True
        run = load_run(tmp_path / "run")
        for table in TABLES:
            pd.testing.assert_frame_equal(run.read(table), whole[table], check_categorical=False)
        shutil.rmtree(tmp_path / "run")
        if not killed:
            break
    assert kill_at > 16  # eight tables, the manifest, eight streams


def test_a_full_disk_ends_the_stream_at_its_last_whole_batch(tmp_path: Path) -> None:
    writer = write_run(tmp_path / "run", 2)
    stream = writer._streams["steps"]
    real = stream._file

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def write(self, data: bytes) -> int:
            if len(data) < 40:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(real.write(data[: len(data) // 2]))

    stream._file = Full()
    with pytest.raises(OSError, match="No space left"):
        write_step(writer, 3)
    stream._file = real
    with pytest.raises(OSError, match="No space left"):
        write_step(writer, 4)
    assert load_run(tmp_path / "run").steps["step"].tolist() == [1, 2]
    writer.close("failed", "disk full")
    run = load_run(tmp_path / "run")
    assert (run.status, run.manifest.message) == ("failed", "disk full")
    assert run.modules["step"].tolist() == [1, 1, 2, 2]


def test_modules_declared_after_opening_are_known_when_read(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", Manifest(command=("x",), columns=MANIFEST.columns))
    run = load_run(tmp_path / "run")
    writer.update_manifest(modules=MANIFEST.modules)
    write_step(writer, 1)
    assert run.modules["module"].tolist() == list(NAMES)


def test_numbers_as_keys_of_extra_do_not_read_as_damage(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", Manifest(command=("x",), extra={"by_layer": {2: 0.5, 10: 0.25}})).close()
    assert load_run(tmp_path / "run").manifest.extra == {"by_layer": {"2": 0.5, "10": 0.25}}


def test_faults_say_what_and_where(tmp_path: Path) -> None:
    writer = write_run(tmp_path / "run", 1)
    with pytest.raises(RunError, match=r"manifest\.json"):
        RunWriter(tmp_path / "run", MANIFEST)
    with pytest.raises(RunError, match=r"nowhere\.proj"):
        writer.append("modules", {"step": [1], "module": ["nowhere.proj"]})
    with pytest.raises(RunError, match="absent"):
        load_run(tmp_path / "absent")
    newer = tmp_path / "newer"
    later = SCHEMA_VERSION + 1
    RunWriter(newer, Manifest(command=("x",), schema_version=later, packages={"linchain-analysis": "9.1"}))
    with pytest.raises(RunError, match=rf"got version {later}; install the linchain-analysis that wrote it, 9\.1"):
        load_run(newer)


def test_many_runs_read_as_one(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / "grid" / f"seed{seed}", 2 + seed).close()
    runs = load_runs(tmp_path)
    assert runs.catalogue["num_steps"].tolist() == [2, 3]
    assert runs.read("steps", ["step"])["step"].tolist() == [1, 2, 1, 2, 3]
    assert runs.steps["run"].unique().tolist() == ["seed0", "seed1"]
    assert runs.health[["run", "step"]].values.tolist() == [["seed0", 1], ["seed0", 3], ["seed1", 1], ["seed1", 3]]


@pytest.mark.parametrize("num_rows", [1, 2, 7, 40, 160])
def test_columns_that_are_not_given_read_as_missing(tmp_path: Path, num_rows: int) -> None:
    writer = RunWriter(tmp_path / "run", MANIFEST)
    writer.append("modules", {"step": [1] * num_rows, "module": [NAMES[0]] * num_rows})
    writer.append("steps", {"step": [1]})
    run = load_run(tmp_path / "run")
    assert len(run.modules) == num_rows
    assert run.modules["delta_norm"].isna().all()
    assert run.steps["loss"].isna().all()
