"""Runs whose training went on from a checkpoint: they read as if they had been written in one go."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_runs
from runs.make_schema_run import write_next_part, write_run
from runs.test_writer import DATA, check_resumed

from linchain_analysis.errors import DamageError, InputError, RunError
from linchain_analysis.runs import RunWriter, append_evals, load_run, load_runs, read_snapshots
from linchain_analysis.runs import continuation as continuing
from linchain_analysis.runs import writer as writing

TABLES = ("steps", "modules", "factors", "links", "evals", "snapshots", "health")
ENDINGS = ("complete", "failed", "live", "cut")


def append_steps(writer: RunWriter, steps: range) -> None:
    for step in steps:
        small_runs.append_step(writer, step)
        writer.append("evals", {"step": [step], "split": ["eval"], "metric": ["f1"], "value": [step / 2]})
        writer.append("scalars", {"step": [step], "name": ["reward"], "value": [step / 4]})


def leave(writer: RunWriter, how: str) -> None:
    """End a part: completed, failed, or killed, with or without a batch that was being written."""
    if how in ("complete", "failed"):
        writer.close(how)
        return
    small_runs.append_step(writer, 99, with_steps_row=False)  # of a step that never ended
    number = writer.manifest.number
    for table, stream in writer._streams.items():
        stream._file.close()
        path = writer.path / (f"{table}.arrows" if number == 1 else f"{table}-{number}.arrows")
        if how == "cut" and table in ("modules", "factors"):
            path.write_bytes(path.read_bytes()[:-40])
    writer._lock.release()


def write_parts(path: Path, *parts: tuple[int, int, str]) -> None:
    """Write parts of (after, last step, ending)."""
    writer = RunWriter(path, small_runs.manifest())
    for number, (after, last, how) in enumerate(parts):
        if number:
            writer = RunWriter.resume(path, small_runs.manifest(), after=after)
        append_steps(writer, range(after + 1, last + 1))
        leave(writer, how)


def assert_same(found: Path, whole: Path) -> None:
    run, expected = load_run(found), load_run(whole)
    for table in TABLES:
        pd.testing.assert_frame_equal(run.read(table), expected.read(table), check_exact=True)
    for columns in (["step", "effective_rank", "kind"], ["delta_norm"], ["participation_ratio", "module"]):
        pd.testing.assert_frame_equal(run.read("modules", columns), expected.read("modules", columns), check_exact=True)
    assert run.read("evals", ["value"])["value"].tolist() == expected.evals["value"].tolist()
    assert run.num_steps == expected.num_steps == len(run.steps)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    write_parts(folder, (0, 8, "complete"))
    return folder


@pytest.mark.parametrize("first", ENDINGS)
@pytest.mark.parametrize("last", ENDINGS)
def test_two_parts_read_as_one(whole: Path, tmp_path: Path, first: str, last: str) -> None:
    write_parts(tmp_path / "run", (0, 6, first), (4, 8, last))
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "parts",
    [
        [(0, 6, "live"), (5, 7, "complete"), (3, 4, "cut"), (4, 8, "complete")],
        [(0, 6, "complete"), (5, 5, "live"), (3, 8, "failed")],  # a part without a step
        [(0, 9, "complete"), (0, 3, "live"), (3, 8, "live")],  # from the very beginning
        [(0, 6, "complete"), (4, 8, "live"), (2, 6, "complete"), (6, 7, "live"), (1, 8, "complete")],
    ],
)
def test_limits_of_many_parts_compound(whole: Path, tmp_path: Path, parts: list[tuple[int, int, str]]) -> None:
    write_parts(tmp_path / "run", *parts)
    assert_same(tmp_path / "run", whole)
    run = load_run(tmp_path / "run")
    limits = [min(after for after, _, _ in parts[number:]) for number in range(1, len(parts))]
    assert [segment.last_step for segment in run.manifest.segments] == limits
    assert len({segment.number for segment in run.manifest.segments} | {run.manifest.number}) == len(parts)


@pytest.mark.parametrize("close", [False, True])
def test_parts_of_other_measures_are_one_table(tmp_path: Path, close: bool) -> None:
    write_run(tmp_path / "run", 3)._lock.release()
    writer = write_next_part(tmp_path / "run")
    if close:
        writer.close()
    check_resumed(load_run(tmp_path / "run"))
    assert load_run(tmp_path / "run").read("modules", ["second_share"]).isna().sum().tolist() == [4]


def test_the_files_of_earlier_parts_stay(tmp_path: Path) -> None:
    write_parts(tmp_path / "run", (0, 6, "live"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.arrows")}
    writer = RunWriter.resume(tmp_path / "run", small_runs.manifest(), after=2)
    append_steps(writer, range(3, 5))
    writer.close()
    for name, data in before.items():
        assert (tmp_path / "run" / name).read_bytes() == data
    assert sorted(path.name for path in (tmp_path / "run").glob("*-2.*")) == sorted(
        f"{table}-2.parquet" for table in (*TABLES, "scalars")
    )


def test_the_last_evaluation_stands(tmp_path: Path) -> None:
    write_parts(tmp_path / "run", (0, 4, "complete"))
    rows = {"step": [3], "split": ["eval"], "metric": ["f1"], "value": [7.0]}
    writer = RunWriter.resume(tmp_path / "run", small_runs.manifest(), after=3)
    writer.append("evals", rows)
    writer.append("scalars", {"step": [3], "name": ["reward"], "value": [9.0]})
    writer.close()
    append_evals(tmp_path / "run", {**rows, "step": [2], "value": [8.0]})
    run = load_run(tmp_path / "run")
    assert run.evals[["step", "value"]].values.tolist() == [[1, 0.5], [3, 7.0], [2, 8.0]]
    assert run.steps["reward"].tolist() == [0.25, 0.5, 9.0]
    assert load_runs(tmp_path).catalogue[["status", "num_steps"]].values.tolist() == [["complete", 3]]


def test_evaluations_after_the_end_do_not_stand_in_the_way(whole: Path, tmp_path: Path) -> None:
    write_parts(tmp_path / "run", (0, 6, "complete"))
    for step in (40, 50):  # these take the names evals-2 and evals-3
        append_evals(tmp_path / "run", {"step": [step], "split": ["a"], "metric": ["b"], "value": [1.0]})
    writer = RunWriter.resume(tmp_path / "run", small_runs.manifest(), after=6)
    append_steps(writer, range(7, 9))
    writer.close()
    assert_same(tmp_path / "run", whole)


def test_a_kill_anywhere_in_resume_leaves_the_run_and_the_next_attempt_alone(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    write_parts(tmp_path / "intact", (0, 6, "live"))
    for kill_at in range(1, 100):
        shutil.copytree(tmp_path / "intact", tmp_path / "run")
        num_calls = 0
        with monkeypatch.context() as patch:
            for owner, name in ((writing, "StreamWriter"), (writing, "write_manifest"), (Path, "replace")):
                original = getattr(owner, name)

                def counted(*args: Any, original: Any = original, at: int = kill_at, **kwargs: Any) -> Any:
                    nonlocal num_calls
                    num_calls += 1
                    if num_calls == at:
                        raise Killed
                    return original(*args, **kwargs)

                patch.setattr(owner, name, counted)
            try:
                RunWriter.resume(tmp_path / "run", small_runs.manifest(), after=4)._lock.release()
                killed = False
            except Killed:
                killed = True
        if killed:
            assert load_run(tmp_path / "run").steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
        writer = RunWriter.resume(tmp_path / "run", small_runs.manifest(), after=4)
        append_steps(writer, range(5, 9))
        writer.close()
        assert_same(tmp_path / "run", whole)
        shutil.rmtree(tmp_path / "run")
        if not killed:
            break
    assert kill_at == 11  # eight streams, the manifest, its replacement, and none


def test_what_is_not_the_same_training_is_refused(tmp_path: Path) -> None:
    write_parts(tmp_path / "run", (0, 4, "complete"))
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    records = small_runs.manifest().modules
    other = replace(records[0], factors=(("A", (8, 3)), ("W1", (3, 3)), ("B", (3, 6))))
    for modules, match in (
        (records[:1], r"got 1 modules, other model\.layers\.1"),
        (records[::-1], "in another order"),
        ((other, records[1]), r"other model\.layers\.0\.self_attn\.q_proj"),
    ):
        with pytest.raises(RunError, match=match):
            RunWriter.resume(tmp_path / "run", small_runs.manifest(modules=modules), after=4)
    with pytest.raises(RunError, match="up to 4, got step 5"):
        RunWriter.resume(tmp_path / "run", small_runs.manifest(), after=5)
    with pytest.raises(InputError, match="got -1"):
        RunWriter.resume(tmp_path / "run", small_runs.manifest(), after=-1)
    with pytest.raises(RunError, match=r"no manifest\.json"):
        RunWriter.resume(tmp_path, small_runs.manifest(), after=1)
    assert not (tmp_path / ".lock").exists()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_column_that_changed_its_kind_is_refused(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", small_runs.manifest(columns={"modules": [["mine", "float"]]})).close()
    with pytest.raises(RunError, match=r"modules\.mine to be float.* got text"):
        RunWriter.resume(tmp_path / "run", small_runs.manifest(columns={"modules": [["mine", "text"]]}), after=0)


@pytest.mark.parametrize("version", [1, 2])
def test_a_run_of_an_older_schema_is_not_gone_on_with(tmp_path: Path, version: int) -> None:
    shutil.copytree(DATA / f"schema-{version}" / "complete", tmp_path / "run")
    manifest = replace(small_runs.manifest(), modules=load_run(tmp_path / "run").manifest.modules)
    with pytest.raises(RunError, match=f"got version {version}; start a new run"):
        RunWriter.resume(tmp_path / "run", manifest, after=1)
    assert load_run(tmp_path / "run").num_steps == 3


def test_a_stream_of_an_earlier_part_that_was_cut_is_damage(tmp_path: Path) -> None:
    """It cannot be one that is being written, and what follows it would look as if it followed what is left."""
    write_parts(tmp_path / "run", (0, 6, "live"), (6, 8, "complete"))
    path = tmp_path / "run" / "steps.arrows"
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(DamageError, match=r"steps\.arrows: .* rows instead of 6"):
        load_run(tmp_path / "run").steps  # noqa: B018
    with pytest.raises(DamageError, match=r"steps\.arrows"):
        RunWriter.resume(tmp_path / "run", small_runs.manifest(), after=7)
    with pytest.warns(UserWarning, match="rows instead of 6"):
        run = load_run(tmp_path / "run", damaged="drop")
        steps = run.steps["step"].tolist()
        assert steps == list(range(1, len(steps) + 1)) and 0 < len(steps) < 6
        assert run.modules["step"].max() == steps[-1]
    path.unlink()
    with pytest.raises(DamageError, match=r"steps\.arrows: .*no such file"):
        load_run(tmp_path / "run").steps  # noqa: B018


def test_snapshots_of_superseded_steps_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 3).close()
    manifest = load_run(tmp_path / "run").manifest
    RunWriter.resume(tmp_path / "run", replace(manifest, tables={}), after=1).close()
    assert list(read_snapshots(load_run(tmp_path / "run"))) == []


def test_a_run_that_was_opened_before_reads_right_at_any_moment(tmp_path: Path) -> None:
    """Another process goes on with the run, several times, while this one reads it."""
    path = tmp_path / "run"
    write_parts(path, (0, 6, "live"))
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from runs.test_resumed import append_steps, small_runs, RunWriter
for after in (5, 3, 7, 2):
    writer = RunWriter.resume({str(path)!r}, small_runs.manifest(), after=after)
    append_steps(writer, range(after + 1, after + 9))
    if after != 3: writer.close()
    else: writer._lock.release()
"""
    other = subprocess.Popen([sys.executable, "-c", code])
    run, num_reads = load_run(path), 0
    while other.poll() is None or not num_reads:
        for each in (run, load_run(path)):
            modules, steps = each.read("modules"), each.read("steps")
            assert steps["step"].tolist() == list(range(1, len(steps) + 1))
            assert steps["loss"].tolist() == [10.0 / step for step in steps["step"]]
            per_step = modules.groupby("step").size()
            assert (per_step == 2).all() and per_step.index.tolist() == list(range(1, len(per_step) + 1))
            num_reads += 1
    assert other.returncode == 0
    run = load_run(path)
    assert (run.num_steps, run.status, len(run.manifest.segments)) == (10, "complete", 4)
    np.testing.assert_array_equal(run.modules["step"].to_numpy(), np.repeat(np.arange(1, 11), 2))


def test_the_continuation_can_be_told_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 2).close("interrupted", "by hand")
    old = load_run(tmp_path / "run").manifest
    new = replace(small_runs.manifest(modules=old.modules, extra={"b": 1}), command=("other.py",), num_steps=9)
    found = continuing.continue_manifest(tmp_path / "run", old, new, 1)
    assert (found.method, found.problem, found.init_seed, found.started) == ("moslora-2", "sums", 1, old.started)
    assert (found.command, found.num_steps, found.resumed, found.status) == (("other.py",), 9, new.started, "running")
    assert (found.segments[0].status, found.segments[0].message) == ("interrupted", "by hand")
    assert (found.segments[0].started, found.segments[0].ended) == (old.started, old.ended)


@pytest.mark.slow
def test_a_run_that_is_killed_and_gone_on_with_again_and_again(tmp_path: Path) -> None:
    """kill -9 at any moment of opening, writing and completing a part; what was finished is there, and right."""
    path, rng = tmp_path / "run", np.random.default_rng(0)
    write_parts(path, (0, 3, "live"))
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from runs.test_resumed import append_steps, small_runs, RunWriter
print("ready", flush=True)
after = int(sys.stdin.readline())
while True:
    writer = RunWriter.resume({str(path)!r}, small_runs.manifest(), after=after)
    print(after, flush=True)
    append_steps(writer, range(after + 1, after + 7))
    writer.close()
    after += 5
"""
    last, num_seen_alive, num_kills = 3, 0, 0
    killed_at: set[int] = set()  # steps of which nobody wrote the evaluation, if the run goes on from there
    while num_kills < 15 or (last < 20 and num_kills < 100):
        num_kills += 1
        after = max(last - int(rng.integers(0, 3)), 0)
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write(f"{after}\n")
        process.stdin.flush()
        if num_kills % 2:
            assert process.stdout.readline() == f"{after}\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(float(rng.uniform(0, 0.3)))
        num_seen_alive += load_run(path).is_alive is True
        process.kill()
        process.wait()
        run = load_run(path)
        assert run.is_alive is False
        steps = run.steps
        last = run.num_steps
        assert steps["step"].tolist() == list(range(1, last + 1)) and last >= after
        assert steps["loss"].tolist() == [10.0 / step for step in steps["step"]]
        assert (run.modules.groupby("step").size() == 2).all() and run.modules["step"].nunique() == last
        assert run.factors["step"].tolist() == np.repeat(np.arange(1, last + 1), 6).tolist()
        evals = run.evals  # written after the rows of a step, so of the step of a kill it may be missing
        killed_at.add(last)
        assert evals["value"].tolist() == [step / 2 for step in evals["step"]]
        assert set(range(1, last)) - killed_at <= set(evals["step"]) and not evals.duplicated(["step"]).any()
    assert last >= 20 and num_seen_alive
    writer = RunWriter.resume(path, small_runs.manifest(), after=8)
    writer.close()
    write_parts(tmp_path / "whole", (0, 8, "complete"))
    assert_same(path, tmp_path / "whole")
