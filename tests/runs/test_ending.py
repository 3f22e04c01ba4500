"""How a run ends where it cannot end as it should: no room, no time, no folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import small_runs
from runs.make_schema_run import MANIFEST, write_run

from linchain_analysis.errors import RunError
from linchain_analysis.runs import RunWriter, load_run

TESTS = str(Path(__file__).parents[1])


def run_limited(code: str) -> str:
    head = f"""
import sys; sys.path.insert(0, {TESTS!r})
import resource, small_runs
from linchain_analysis.errors import RunError
from linchain_analysis.runs import RunWriter, load_run
def limit(num_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
"""
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Of a run of 40 steps: no stream can grow, but Parquet is smaller; no room for modules.parquet (6 kB, 5 kB); for hardly
# anything and neither for the manifest; for nothing.
@pytest.mark.parametrize(
    ("num_bytes", "status"), [(20_000, "complete"), (4_500, "failed"), (1_400, "running"), (0, "running")]
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_full_disk_leaves_what_was_recorded(tmp_path: Path, num_bytes: int, status: str, resumed: bool) -> None:
    path = tmp_path / "run"
    said = run_limited(f"""
writer = small_runs.write_run({str(path)!r}, 40, close=False)
if {resumed}:
    writer.close()
    writer = RunWriter.resume({str(path)!r}, small_runs.manifest(), after=20)
    for step in range(21, 41): small_runs.append_step(writer, step)
limit({num_bytes})
failed = 0
for step in range(41, 200):
    try: small_runs.append_step(writer, step)
    except OSError as error: failed += 1; last = error
print(failed, last.errno)
try: writer.close("complete", "as planned")
except RunError as error: print(error)
""")
    assert "27\n" in said  # EFBIG
    assert ("expected its tables to become Parquet, got OSError" in said) == (status != "complete")
    run = load_run(path)
    assert run.status == status
    if status == "failed":
        assert run.manifest.message is not None
        assert run.manifest.message.startswith("as planned; its tables could not become Parquet (")
    assert run.is_alive is False
    assert not list(path.glob("*.part")) and len(list(path.glob("*.parquet"))) == 8 * (resumed + (status == "complete"))
    steps = run.steps["step"].tolist()
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 40
    assert run.modules["step"].max() >= 40
    assert run.steps["loss"].tolist() == [10.0 / step for step in steps]
    # With room again the training goes on where it stood.
    writer = RunWriter.resume(path, small_runs.manifest(), after=40)
    small_runs.append_step(writer, 41)
    writer.close()
    assert load_run(path).steps["step"].tolist() == list(range(1, 42))


def test_room_that_comes_back_completes_the_run(tmp_path: Path) -> None:
    run_limited(f"""
writer = small_runs.write_run({str(tmp_path / "run")!r}, 40, close=False)
limit(1500)
try: small_runs.append_step(writer, 41)
except OSError: pass
limit(resource.RLIM_INFINITY)
writer.close("failed", "full")
""")
    run = load_run(tmp_path / "run")
    assert (run.status, run.manifest.message, run.num_steps) == ("failed", "full", 40)


def test_a_mark_is_all_that_changes(tmp_path: Path) -> None:
    writer = write_run(tmp_path / "run", 2)
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    writer.mark("interrupted", "SIGTERM")
    after = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    assert {name for name in after if before.get(name) != after[name]} == {"manifest.json"}
    run = load_run(tmp_path / "run")
    assert (run.status, run.manifest.message, run.num_steps) == ("interrupted", "SIGTERM", 2)
    assert run.manifest.ended is not None
    assert (writer.manifest.status, writer.manifest.ended) == ("interrupted", run.manifest.ended)
    assert run.is_alive is True
    writer.append("steps", {"step": [3], "loss": [0.5]})
    assert load_run(tmp_path / "run").num_steps == 3
    writer.update_manifest(extra={"a": 1})
    assert load_run(tmp_path / "run").status == "interrupted"
    writer.close()
    run = load_run(tmp_path / "run")
    assert (run.status, run.manifest.message, run.num_steps) == ("complete", None, 3)
    assert run.manifest.extra == {"a": 1}
    writer.mark("failed", "too late")
    assert load_run(tmp_path / "run").status == "complete"


def test_a_run_that_was_marked_and_died_reads_and_goes_on(tmp_path: Path) -> None:
    writer = small_runs.write_run(tmp_path / "run", 3, close=False)
    writer.mark("interrupted", "SIGTERM")
    writer._lock.release()
    run = load_run(tmp_path / "run")
    assert (run.status, run.is_alive, len(run.factors)) == ("interrupted", False, 18)
    writer = RunWriter.resume(tmp_path / "run", small_runs.manifest(), after=2)
    assert (writer.manifest.status, writer.manifest.ended) == ("running", None)
    assert (writer.manifest.segments[0].status, writer.manifest.segments[0].message) == ("interrupted", "SIGTERM")


def test_a_mark_may_come_from_another_thread_at_any_time(tmp_path: Path) -> None:
    writer = small_runs.write_run(tmp_path / "run", 1, close=False)
    stop = threading.Event()

    def mark() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            writer.mark("interrupted", f"mark {number}")

    thread = threading.Thread(target=mark)
    thread.start()
    for step in range(2, 40):
        small_runs.append_step(writer, step)
        writer.update_manifest(extra={"step": step})
        run = load_run(tmp_path / "run")
        assert (run.manifest.extra, run.num_steps) == ({"step": step}, step)
    writer.close()
    stop.set()
    thread.join()
    run = load_run(tmp_path / "run")
    assert run.manifest.tables and run.num_steps == 39
    assert not list((tmp_path / "run").glob("*.part")) and not list((tmp_path / "run").glob("*.arrows"))


def test_a_mark_may_interrupt_anything(tmp_path: Path) -> None:
    """From a signal handler, in the thread that is writing the manifest, appending or completing."""
    code = f"""
import sys; sys.path.insert(0, {TESTS!r})
import random, signal, small_runs
from linchain_analysis.runs import RunWriter, load_run
for attempt in range(3):
    path = {str(tmp_path)!r} + f"/run-{{attempt}}"
    writer = small_runs.write_run(path, 1, close=False)
    num_marks = 0
    def handle(*_):
        global num_marks
        num_marks += 1
        writer.mark("interrupted", f"mark {{num_marks}}")
        if going: signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0005, 0.02))
    going = True
    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.003)
    step = 1
    while step < 39 or num_marks <= 5:
        step += 1
        small_runs.append_step(writer, step)
        writer.update_manifest(extra={{"step": step}})
        assert writer.manifest.extra == {{"step": step}}
    run = load_run(path)
    assert run.status == "interrupted" and run.manifest.extra == {{"step": step}}, run
    writer.close()
    going = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    run = load_run(path)
    assert run.manifest.tables and run.num_steps == step and len(run.factors) == step * 6
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("*/*.part"))


@pytest.mark.parametrize("how", ["deleted", "renamed", "replaced", "made anew"])
def test_a_folder_that_vanished_is_said(tmp_path: Path, how: str) -> None:
    path = tmp_path / "run"
    writer = small_runs.write_run(path, 2, close=False)
    other = None
    if how in ("deleted", "made anew"):
        shutil.rmtree(path)
    else:
        path.rename(tmp_path / "aside")
    if how == "replaced":
        other = small_runs.write_run(path, 1, close=False)
    if how == "made anew":
        path.mkdir()
    before = {file.name: file.read_bytes() for file in path.iterdir()} if path.exists() else None
    match = rf"the run folder {path}: expected the \S+ that is being written, got .*: it vanished or was replaced"
    with pytest.raises(RunError, match=match):
        small_runs.append_step(writer, 3)
    with pytest.raises(RunError, match=match):
        writer.update_manifest(extra={"a": 1})
    with pytest.raises(RunError, match=match):
        writer.mark("failed")
    with pytest.raises(RunError, match=match):
        writer.close()
    after = {file.name: file.read_bytes() for file in path.iterdir()} if path.exists() else None
    assert before == after  # somebody else's run is not touched
    if how in ("renamed", "replaced"):
        assert load_run(tmp_path / "aside").num_steps == 2
    if other is not None:
        other.close()
        assert load_run(path).num_steps == 1


def test_a_single_stream_that_vanished_is_said(tmp_path: Path) -> None:
    writer = write_run(tmp_path / "run", 1)
    (tmp_path / "run" / "health.arrows").unlink()
    with pytest.raises(RunError, match=r"the health\.arrows that is being written, got none: it vanished"):
        writer.append("health", {"step": [1]})
    with pytest.raises(RunError, match="vanished"):
        writer.close()


def test_a_training_that_changes_its_folder_writes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer = small_runs.write_run(Path("run"), 1, close=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    small_runs.append_step(writer, 2)
    writer.close()
    assert writer.path == Path("run")
    assert load_run(tmp_path / "run").num_steps == 2
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_writer_that_died_while_it_made_its_streams_left_an_empty_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(path: Path, schema: object) -> None:
        if path.name == "evals.arrows":
            raise Killed
        path.touch()

    with monkeypatch.context() as patch:
        patch.setattr("linchain_analysis.runs.writer.StreamWriter", die)
        with pytest.raises(Killed):
            RunWriter(tmp_path / "run", MANIFEST)
    run = load_run(tmp_path / "run")
    assert run.num_steps == 0 and run.evals.empty and run.modules.empty
    writer = RunWriter.resume(tmp_path / "run", MANIFEST, after=0)
    writer.append("steps", {"step": [1]})
    writer.close()
    assert load_run(tmp_path / "run").num_steps == 1


def test_signals_reach_a_run_that_is_killed_after_its_mark(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {TESTS!r})
import os, signal, small_runs
writer = small_runs.write_run({str(tmp_path / "run")!r}, 2, close=False)
def handle(number, _):
    writer.mark("interrupted", signal.Signals(number).name)
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, handle)
os.kill(os.getpid(), signal.SIGTERM)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGKILL
    run = load_run(tmp_path / "run")
    assert (run.status, run.manifest.message, run.num_steps) == ("interrupted", "SIGTERM", 2)
