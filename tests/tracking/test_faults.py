"""What goes wrong with the run folder ends tracking, with one message; training goes on to its end as without."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_training

from linchain_analysis import Tracker, load_run

# Twelve steps that print their losses; `{before}` is at the very beginning, `{at}` after the sixth step.
TRAINING = """
{before}
model = build()
optimizer = optimize(model)
{track}
for number in range(1, 13):
    print(repr(train_step(model, optimizer, number).item()), flush=True)
    if number == 6:
        {at}
{close}
"""


def script(path: str | None = "run", *, before: str = "", at: str = "pass") -> str:
    track = "" if path is None else f"tracker = Tracker(model, optimizer, {path!r})"
    close = "" if path is None else "tracker.log(late=1.0)\ntracker.log_eval('eval', late=1.0)\ntracker.close()"
    return TRAINING.format(before=before, track=track, at=at, close=close)


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> str:
    process = small_training.start(script(None), tmp_path_factory.mktemp("untracked"))
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out.count("\n")) == (0, 12), err
    return out


def messages(folder: Path, text: str, untracked: str, **how: bool) -> list[str]:
    """Run a training that something goes wrong with; return what the tracker said, but for what it always says."""
    process = small_training.start(text, folder, **how)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert out == untracked
    assert "Traceback" not in err
    usual = re.compile(r"linchain_analysis: (health|\d+ steps in|tracking into)")
    said = [line for line in err.splitlines() if line and not usual.match(line)]
    print("\n".join(said))
    return said


def limit(size: int) -> str:
    """The next byte after `size` of any file is refused, as on a full disk."""
    return f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))"


def test_a_disk_that_is_full_from_the_beginning(tmp_path: Path, untracked: str) -> None:
    [said] = messages(tmp_path, script(before=limit(100)), untracked)
    assert re.fullmatch(
        r"tracker: expected a run folder that can be written, got run \(OSError: .*\); training goes on untracked\. "
        r"Free space on that disk\.",
        said,
    )


def test_a_disk_that_fills_up(tmp_path: Path, untracked: str) -> None:
    [said] = messages(tmp_path, script(before=limit(5_000)), untracked)
    assert said.startswith("tracker, at step ")
    run = load_run(tmp_path / "run")
    assert run.status == "failed"
    assert len(run.steps) == int(said.split()[3].rstrip(":")) - 1
    assert 1 <= len(run.steps) < 12
    assert len(run.modules) == 2 * len(run.steps)
    assert run.steps["loss"].tolist() == [float(line) for line in untracked.split()[: len(run.steps)]]


@pytest.mark.slow
def test_a_disk_that_has_room_for_the_rows_but_not_for_the_tables(tmp_path: Path, untracked: str) -> None:
    """What is recorded stays in the streams."""
    [said] = messages(tmp_path, script().replace("tracker.close()", f"{limit(100)}; tracker.close()"), untracked)
    assert said.startswith("tracker.close: ")
    run = load_run(tmp_path / "run")
    assert run.status in ("failed", "running")
    assert len(run.steps) == 12
    assert len(run.modules) == 24


def messages_here(
    path: Path, caplog: pytest.LogCaptureFixture, untracked: str, at: Callable[[], None] = lambda: None
) -> list[str]:
    """The same in this process, which is quicker, for what concerns nothing but the folder."""
    model = small_training.build()
    optimizer = small_training.optimize(model)
    with Tracker(model, optimizer, path, quiet=True) as tracker:
        losses = []
        for number in range(1, 13):
            losses.append(small_training.train_step(model, optimizer, number).item())
            if number == 6:
                at()
        tracker.log(late=1.0)
        tracker.log_eval("eval", late=1.0)
    assert [repr(loss) for loss in losses] == untracked.split()
    print(caplog.messages)
    return caplog.messages


@pytest.mark.parametrize("place", ["/proc/nowhere/run", "file/run", "file"])
def test_a_folder_that_cannot_be_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, untracked: str, place: str
) -> None:
    (tmp_path / "file").touch()
    [said] = messages_here(tmp_path / place, caplog, untracked)
    assert said.startswith(f"tracker: expected a run folder that can be written, got {tmp_path / place} (")
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("place", ["sealed/run", pytest.param("sealed", marks=pytest.mark.slow)])
def test_a_folder_that_may_not_be_written(tmp_path: Path, untracked: str, place: str) -> None:
    (tmp_path / "sealed").mkdir(mode=0o555)
    before = ""
    if os.getuid() == 0:  # nothing is sealed for root, who becomes nobody as far as files are concerned
        before = "import ctypes; ctypes.CDLL(None).setfsuid(65534)"
        tmp_path.chmod(0o755)
    [said] = messages(tmp_path, script(place, before=before), untracked)
    assert said.startswith(f"tracker: expected a run folder that can be written, got {place} (PermissionError")


def test_a_link_to_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture, untracked: str) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "unmounted" / "run")
    [said] = messages_here(tmp_path / "run", caplog, untracked)
    assert f"got {tmp_path / 'run'} (a link to {tmp_path / 'unmounted' / 'run'}, which is not there)" in said
    assert not (tmp_path / "unmounted").exists()


def test_a_folder_that_vanishes(tmp_path: Path, caplog: pytest.LogCaptureFixture, untracked: str) -> None:
    [said] = messages_here(tmp_path / "run", caplog, untracked, at=lambda: shutil.rmtree(tmp_path / "run"))
    assert said.startswith(
        f"tracker, at step 7: expected a run folder that can be written, got {tmp_path / 'run'} (the run folder "
    )
    assert not (tmp_path / "run").exists()


def test_default_folder_of_the_launcher(tmp_path: Path, untracked: str) -> None:
    (tmp_path / "runs").touch()
    process = small_training.start(script(None), tmp_path, launcher=True, out=None)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (0, untracked), err
    said = [line for line in err.splitlines() if line]
    assert len(said) == 1, err
    assert said[0].startswith("tracker: expected a run folder that can be written, got ")


def test_two_trackers_of_one_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trackers = []
    for _ in range(2):
        model = small_training.build()
        optimizer = small_training.optimize(model)
        trackers.append((model, optimizer, Tracker(model, optimizer, tmp_path / "run", strict=True)))
    assert trackers[1][2].path == tmp_path / "run-2"
    assert caplog.text.count("holds a run already; this one is written to") == 1
    for number in range(1, 5):
        for model, optimizer, _ in trackers:
            small_training.train_step(model, optimizer, number)
    # Not gone on with while it is being written, though it is the same training.
    third = Tracker(*trackers[0][:2], tmp_path / "run", strict=True)
    assert third.path == tmp_path / "run-3"
    for tracker in (*(tracker for *_, tracker in trackers), third):
        tracker.close()
    first, second = load_run(tmp_path / "run"), load_run(tmp_path / "run-2")
    assert first.status == second.status == "complete"
    assert len(first.steps) == 4
    np.testing.assert_array_equal(first.steps["loss"], second.steps["loss"])
    assert len(first.modules) == len(second.modules) == 8


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path, untracked: str) -> None:
    slow = script(at="time.sleep(1)")
    processes = [small_training.start(slow, tmp_path) for _ in range(2)]
    errors = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sum("holds a run already" in err for _, err in errors) == 1, errors
    for name in ("run", "run-2"):
        run = load_run(tmp_path / name)
        assert (run.status, len(run.steps), len(run.modules)) == ("complete", 12, 24)
        assert run.steps["loss"].tolist() == [float(line) for line in untracked.split()]


def record(path: Path, num_steps: int = 3) -> Path:
    """A run that was killed after so many steps."""
    model = small_training.build()
    optimizer = small_training.optimize(model)
    tracker = Tracker(model, optimizer, path, strict=True, quiet=True)
    for number in range(1, num_steps + 1):
        small_training.train_step(model, optimizer, number)
    tracker._watch.close()
    tracker._writer._lock.release()
    return path


@pytest.mark.parametrize("damage", ["tail", "half a manifest", "no manifest", "a part of a manifest"])
def test_what_an_earlier_process_left_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, untracked: str, damage: str
) -> None:
    old = record(tmp_path / "run")
    manifest = old / "manifest.json"
    if damage == "tail":
        stream = old / "steps.arrows"
        stream.write_bytes(stream.read_bytes()[:-5] + b"xxxxx")
    elif damage == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:100])
    elif damage == "no manifest":
        manifest.unlink()
    else:
        for path in old.iterdir():
            path.unlink()
        (old / "manifest.json.part").write_text(json.dumps({"half": "a manifest"})[:9])
    before = {path.name: path.read_bytes() for path in old.iterdir() if not path.name.startswith(".")}
    said = messages_here(tmp_path / "run", caplog, untracked)
    own = "run" if damage == "a part of a manifest" else "run-2"
    if own == "run":
        assert said == []
    else:
        [line] = said
        assert f"this one is written to {tmp_path / 'run-2'}" in line
        assert {p.name: p.read_bytes() for p in old.iterdir() if not p.name.startswith(".")} == before
    run = load_run(tmp_path / own)
    assert (run.status, len(run.steps)) == ("complete", 12)


KILLED = """
model = build()
optimizer = optimize(model)
tracker = Tracker(model, optimizer, "run", quiet=True)
print("open", flush=True)
for number in range(1, int(sys.argv[1]) + 1):
    train_step(model, optimizer, number)
    print(number, flush=True)
tracker.close()
print("closed", flush=True)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """The tables of the training that is killed, when it is not."""
    folder = tmp_path_factory.mktemp("whole")
    model = small_training.build()
    optimizer = small_training.optimize(model)
    with Tracker(model, optimizer, folder / "run", quiet=True):
        for number in range(1, LONGEST + 1):
            small_training.train_step(model, optimizer, number)
    run = load_run(folder / "run")
    return {"steps": run.steps, "modules": run.modules, "factors": run.factors}


LONGEST = 400
SECONDS = ("seconds", "track_seconds")


def kill(folder: Path, whole: dict[str, pd.DataFrame], moment: str, fraction: float) -> tuple[int, int]:
    """Kill a training at a moment and check what is left; return how many steps it had said and how many are lost."""
    num_steps = LONGEST if moment != "close" else 300
    process = small_training.start(KILLED, folder, str(num_steps))
    assert process.stdout is not None
    if moment == "open":
        while not (folder / "run").exists():
            time.sleep(0.0005)
        time.sleep(fraction * 0.05)
    else:
        last = 300 if moment == "close" else max(1, int(fraction * (LONGEST - 50)))
        while (line := process.stdout.readline()) and line != f"{last}\n":
            pass
        time.sleep(fraction * (0.3 if moment == "close" else 0.01))
    process.send_signal(signal.SIGKILL)
    process.wait()
    rest = process.stdout.read().split()
    numbers = [int(word) for word in rest if word.isdigit()]
    printed = numbers[-1] if numbers else (0 if moment == "open" else last)
    if not (folder / "run" / "manifest.json").exists():  # within the first milliseconds
        assert moment == "open" and printed == 0
        return printed, 0
    run = load_run(folder / "run")
    assert run.status == ("complete" if "closed" in rest else run.status)
    assert run.status in ("running", "complete")
    assert run.is_alive is False
    k = len(run.steps)
    assert run.steps["step"].tolist() == list(range(1, k + 1))
    assert k >= printed - 1
    for table, per_step in (("steps", 1), ("modules", 2), ("factors", 8)):
        found = getattr(run, table)
        assert len(found) == k * per_step
        expected = whole[table][: k * per_step]
        timeless = [name for name in expected if name not in SECONDS]
        pd.testing.assert_frame_equal(
            found[timeless], expected[timeless], check_exact=True, check_dtype=False, check_categorical=False
        )
    return printed, max(printed - k, 0)


MOMENTS = ["open", "steps", "steps", "close", "steps", "open", "steps", "close", "steps", "steps"]


@pytest.mark.parametrize(
    "count", [pytest.param(20, marks=pytest.mark.slow), pytest.param(3)], ids=lambda count: f"{count} kills"
)
def test_a_kill_at_any_moment_loses_at_most_the_step_being_written(
    tmp_path: Path, whole: dict[str, pd.DataFrame], count: int
) -> None:
    rng = np.random.default_rng()  # another moment every time
    printed, lost = [], []
    for k in range(count):
        (folder := tmp_path / str(k)).mkdir()
        moment = ["steps", "open", "close"][k] if count == 3 else MOMENTS[k % len(MOMENTS)]
        said, missing = kill(folder, whole, moment, float(rng.random()))
        printed.append((moment, said))
        lost.append(missing)
    print("killed after", printed, "lost", lost)
    assert max(lost) <= 1


def test_a_fault_that_is_kept_keeps_nothing_of_the_training_alive(tmp_path: Path) -> None:
    def train() -> tuple[Tracker, weakref.ref[object]]:
        model = small_training.build()
        optimizer = small_training.optimize(model)
        tracker = Tracker(model, optimizer, tmp_path / "run", quiet=True)

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        tracker._writer.append = fail  # type: ignore[union-attr, method-assign, assignment]
        small_training.train_step(model, optimizer, 1)
        return tracker, weakref.ref(optimizer)

    tracker, optimizer = train()
    gc.collect()
    assert isinstance(tracker.fault, OSError)
    assert optimizer() is None
