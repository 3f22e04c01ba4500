"""One writer at a time, and who it is."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import small_runs

from linchain_analysis.errors import RunError
from linchain_analysis.runs import Manifest, RunWriter, append_evals, load_run
from linchain_analysis.runs.lock import LOCK, RunLock, is_locked
from linchain_analysis.runs.process import describe_process, is_here, is_running

TESTS = str(Path(__file__).parents[1])


def start(code: str) -> subprocess.Popen[str]:
    head = f"import sys; sys.path.insert(0, {TESTS!r})\nimport os, time, small_runs\n"
    head += "from linchain_analysis.runs import RunWriter, load_run\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def listen(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip()


def start_writing(path: Path) -> subprocess.Popen[str]:
    """A process that has written two steps and stays."""
    process = start(
        f"w = small_runs.write_run({str(path)!r}, 2, close=False)\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    assert listen(process) == "ready"
    return process


def test_a_second_writer_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "run"
    writer = small_runs.write_run(path, 2, close=False)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    for again in (
        lambda: RunWriter(path, small_runs.manifest()),
        lambda: RunWriter.resume(path, small_runs.manifest(), after=1),
    ):
        with pytest.raises(RunError, match=rf"being written by another writer of this process \(pid {os.getpid()}\)"):
            again()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    small_runs.append_step(writer, 3)
    writer.close()
    assert load_run(path).num_steps == 3
    RunWriter.resume(path, small_runs.manifest(), after=3).close()


def test_another_process_is_named_and_its_death_frees_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = start_writing(path)
    run = load_run(path)
    assert run.manifest.process is not None and run.manifest.process["pid"] == process.pid
    assert run.is_alive is True
    with pytest.raises(RunError, match=rf"being written by another process \(pid {process.pid}\)"):
        RunWriter.resume(path, small_runs.manifest(), after=1)
    with pytest.raises(RunError, match=rf"manifest\.json.*another process \(pid {process.pid}\)"):
        RunWriter(path, small_runs.manifest())
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (run.is_alive, run.status) == (False, "running")
    with pytest.raises(RunError, match=r"a folder without a run, got manifest\.json"):
        RunWriter(path, small_runs.manifest())
    writer = RunWriter.resume(path, small_runs.manifest(), after=2)
    assert run.is_alive is True
    small_runs.append_step(writer, 3)
    writer.close()
    assert (run.is_alive, load_run(path).is_alive, load_run(path).num_steps) == (False, False, 3)


@pytest.mark.parametrize("resume", [False, True])
def test_of_many_processes_that_race_one_wins(tmp_path: Path, resume: bool) -> None:
    path = tmp_path / "run"
    if resume:
        small_runs.write_run(path, 2)
    go = tmp_path / "go"
    code = f"""
from linchain_analysis.errors import RunError
print("ready", flush=True)
while not os.path.exists({str(go)!r}): pass
try:
    if {resume}: w = RunWriter.resume({str(path)!r}, small_runs.manifest(), after=2)
    else: w = RunWriter({str(path)!r}, small_runs.manifest(init_seed=os.getpid()))
except RunError as error:
    print(error, flush=True)
else:
    small_runs.append_step(w, 3)
    print("won", flush=True)
    sys.stdin.read()
    w.close()
"""
    racers = [start(code) for _ in range(5)]
    assert [listen(racer) for racer in racers] == ["ready"] * 5
    go.touch()
    said = [listen(racer) for racer in racers]
    assert said.count("won") == 1
    assert sum("being written by another process (pid " in line for line in said) == 4, said
    for racer in racers:
        assert racer.communicate()[1] is None and racer.returncode == 0
    run = load_run(path)
    assert run.status == "complete" and run.steps["step"].tolist() == ([1, 2, 3] if resume else [3])
    assert len(run.manifest.segments) == resume and len(run.factors) == 6 * len(run.steps)


def test_forked_children_neither_hold_nor_end_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    writer = small_runs.write_run(path, 2, close=False)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            writer.close()
            writer.mark("failed")
            writer._lock.release()
            try:
                small_runs.append_step(writer, 3)
            except RunError as error:
                code = 0 if "forked from it" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert is_locked(path) and load_run(path).status == "running"
    small_runs.append_step(writer, 3)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        writer.close()
        assert is_locked(path) is False  # though the child still lives
        assert load_run(path).num_steps == 3
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_writer_that_is_killed_is_not_kept_alive_by_its_children(tmp_path: Path) -> None:
    code = f"""
w = small_runs.write_run({str(tmp_path / "run")!r}, 2, close=False)
child = os.fork()
if child == 0: time.sleep(30); os._exit(0)
print(child, flush=True)
time.sleep(30)
"""
    process = start(code)
    child = int(listen(process))
    try:
        assert load_run(tmp_path / "run").is_alive is True
        process.kill()
        process.wait()
        assert load_run(tmp_path / "run").is_alive is False
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_writer_that_is_forgotten_lets_go(tmp_path: Path) -> None:
    writer = small_runs.write_run(tmp_path / "run", 2, close=False)
    assert load_run(tmp_path / "run").is_alive is True
    del writer
    gc.collect()
    assert load_run(tmp_path / "run").is_alive is False


def test_a_folder_that_could_not_become_a_run_is_free(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        RunWriter(tmp_path / "run", Manifest(command=("x",), extra={"what": object()}))
    assert is_locked(tmp_path / "run") is False
    RunWriter(tmp_path / "run", small_runs.manifest()).close()


def test_a_lock_is_no_run(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("123\n")
    with pytest.raises(RunError, match=r"no manifest\.json"):
        load_run(tmp_path)
    RunWriter(tmp_path, small_runs.manifest()).close()
    assert load_run(tmp_path).status == "complete"


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK])
def test_without_locks_of_the_file_system_a_run_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    writer = small_runs.write_run(tmp_path / "run", 2, close=False)
    assert load_run(tmp_path / "run").is_alive is True  # by its number
    writer.update_manifest(process={**describe_process(), "started": -1})
    assert load_run(tmp_path / "run").is_alive is False
    writer.close()
    assert load_run(tmp_path / "run").num_steps == 2


def test_of_another_machine_nothing_is_known(tmp_path: Path) -> None:
    writer = small_runs.write_run(tmp_path / "run", 2, close=False)
    writer.update_manifest(process={"pid": 1, "host": "elsewhere", "started": None})
    writer._lock.release()
    assert load_run(tmp_path / "run").is_alive is None
    writer.close()
    assert load_run(tmp_path / "run").is_alive is False


def test_evaluations_are_added_one_after_the_other(tmp_path: Path) -> None:
    small_runs.write_run(tmp_path / "run", 2)
    run = load_run(tmp_path / "run")
    rows: dict[str, Any] = {"step": [2], "split": ["test"], "metric": ["f1"], "value": [1.0]}
    with RunLock(tmp_path / "run"):
        assert run.is_alive is False
    code = f"""
from linchain_analysis.runs import append_evals
for _ in range(5): append_evals({str(tmp_path / "run")!r}, {rows!r})
"""
    others = [start(code) for _ in range(3)]
    assert [other.wait() for other in others] == [0] * 3
    append_evals(tmp_path / "run", rows)
    assert len(load_run(tmp_path / "run").evals) == 1 + 3 * 5 + 1


def test_processes_are_told_apart() -> None:
    own = describe_process()
    assert is_here(own) and is_running(own)
    assert is_running({**own, "started": None})
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert not is_running({"pid": dead.pid, "started": None})
    if sys.platform == "linux":
        assert not is_running({**own, "started": int(own["started"]) - 1})
        waiting = subprocess.Popen([sys.executable, "-c", ""])
        os.waitid(os.P_PID, waiting.pid, os.WEXITED | os.WNOWAIT)  # dead, but nobody has asked how it ended
        assert not is_running({"pid": waiting.pid, "started": 5})
        waiting.wait()
