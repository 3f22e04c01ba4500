"""How a process ends is written down, and it ends as it would have without a tracker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small_training

from linchain_analysis import load_run

LOOP = """
model = build()
optimizer = optimize(model)
tracker = Tracker(model, optimizer, "run")
for number in range(1, 4):
    train_step(model, optimizer, number)
"""


def run(script: str, folder: Path, **how: bool) -> tuple[int, str]:
    """Return the exit status and what stood on standard error."""
    process = small_training.start(script, folder, **how)
    _, err = process.communicate(timeout=100)
    return process.returncode, err


def run_and_signal(script: str, folder: Path, number: int, **how: bool) -> tuple[int, float, str]:
    """Send signal `number` once the script says it is ready; return exit status, seconds until the end, errors."""
    process = small_training.start(script, folder, **how)
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "ready\n":
        assert line, process.communicate()[1]
    sent = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    return process.returncode, time.monotonic() - sent, err


def ending(folder: Path) -> tuple[str, str | None, int]:
    found = load_run(folder / "run")
    return found.status, found.manifest.message, len(found.steps)


WAITS = {
    "python": "while True: time.sleep(0.01)",
    # Long calls in which no signal handler of Python's can run: they wait, or compute.
    "product": "x = torch.randn(9000, 9000)\nprint('ready', flush=True)\nwhile True: x @ x",
    "join": "import threading\nt = threading.Thread(target=time.sleep, args=(60,), daemon=True); t.start()\n"
    "import ctypes\nprint('ready', flush=True)\nctypes.CDLL(None).sleep(60)",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("wait", list(WAITS))
def test_a_signal_marks_the_run_and_ends_the_process_as_without(
    tmp_path: Path, number: signal.Signals, wait: str
) -> None:
    if wait != "python" and number == signal.SIGHUP:
        pytest.skip("one signal is enough")
    code, seconds, err = run_and_signal(f"{LOOP}print('ready', flush=True)\n{WAITS[wait]}", tmp_path, number)
    assert (code, err) == (-number, "")
    assert seconds < 3
    assert ending(tmp_path) == ("interrupted", number.name, 3)


def test_a_signal_under_the_launcher(tmp_path: Path) -> None:
    untracked = LOOP.replace('tracker = Tracker(model, optimizer, "run")\n', "")
    code, seconds, err = run_and_signal(
        f"{untracked}print('ready', flush=True)\n{WAITS['product']}", tmp_path, signal.SIGTERM, launcher=True
    )
    assert code == -signal.SIGTERM
    assert seconds < 3
    assert "Traceback" not in err
    assert ending(tmp_path) == ("interrupted", "SIGTERM", 3)


def test_a_handler_of_the_script_s_own_is_left_alone(tmp_path: Path) -> None:
    handler = "signal.signal(signal.SIGTERM, lambda *_: (print('own', flush=True), sys.exit(7)))\n"
    for name, script in {"before": handler + LOOP, "after": LOOP + handler}.items():
        (folder := tmp_path / name).mkdir()
        process = small_training.start(f"{script}print('ready', flush=True)\n{WAITS['python']}", folder)
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out) == (7, "own\n"), err
        status, message, num_steps = ending(folder)
        assert (status, num_steps) == ("interrupted", 3)
        assert "the process ended before" in str(message)


def test_signals_are_given_back_with_the_last_tracker(tmp_path: Path) -> None:
    script = f"""
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
{LOOP}
second = Tracker(model, optimizer, "second")
tracker.close()
assert callable(signal.getsignal(signal.SIGTERM))
second.close()
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
assert signal.set_wakeup_fd(-1) == -1
time.sleep(0.2)
import threading
assert [t.name for t in threading.enumerate()] == ["MainThread"]
print('ready', flush=True)
{WAITS["python"]}
"""
    code, _, err = run_and_signal(script, tmp_path, signal.SIGTERM)
    assert (code, "Traceback" in err) == (-signal.SIGTERM, False), err
    assert ending(tmp_path) == ("complete", None, 3)


def test_a_signal_for_an_event_loop_that_has_its_own_descriptor(tmp_path: Path) -> None:
    """asyncio's wakeup descriptor stays its own, and the run is marked all the same."""
    script = f"""
import asyncio
async def main():
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: print("usr1", flush=True))
{LOOP.replace(chr(10), chr(10) + "    ")}
    os.kill(os.getpid(), signal.SIGUSR1)
    await asyncio.sleep(0.1)
    print('ready', flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    code, seconds, err = run_and_signal(script, tmp_path, signal.SIGTERM)
    assert (code, err) == (-signal.SIGTERM, "")
    assert seconds < 3
    assert ending(tmp_path) == ("interrupted", "SIGTERM", 3)


def test_the_end_of_a_forked_child_is_not_the_run_s(tmp_path: Path) -> None:
    script = f"""
{LOOP}
for delay in (0, 0, 0, 0, 0.2):
    child = os.fork()
    if not child:
        while True: time.sleep(0.01)
    time.sleep(delay)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
child = os.fork()
if not child:
    sys.exit(0)
os.waitpid(child, 0)
time.sleep(1)
train_step(model, optimizer, 4)
tracker.close()
"""
    code, err = run(script, tmp_path)
    assert code == 0, err
    assert ending(tmp_path) == ("complete", None, 4)


@pytest.mark.slow
def test_workers_that_load_data_do_not_mark_the_run(tmp_path: Path) -> None:
    script = f"""
from torch.utils.data import DataLoader
{LOOP}
for context in ("fork", "spawn"):
    loader = DataLoader(list(range(8)), num_workers=2, multiprocessing_context=context, persistent_workers=True)
    batches = iter(loader)
    next(batches)
    for worker in batches._workers:
        worker.terminate()
        worker.join()
    assert tracker._writer.manifest.status == "running"
    batches._shutdown_workers()
    del batches, loader
train_step(model, optimizer, 4)
tracker.close()
"""
    guarded = "if __name__ == '__main__':\n" + "\n".join("    " + line for line in script.splitlines())
    code, err = run(guarded, tmp_path)
    assert code == 0, err
    assert ending(tmp_path) == ("complete", None, 4)


@pytest.mark.parametrize(
    "inside", [pytest.param(True, id="with", marks=pytest.mark.slow), pytest.param(False, id="left open")]
)
@pytest.mark.parametrize(
    ("end", "code", "status", "message"),
    [
        ("raise RuntimeError('out of luck')", 1, "failed", "RuntimeError: out of luck"),
        ("sys.exit(3)", 3, "failed", "SystemExit: 3"),
        ("sys.exit()", 0, "complete", None),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(5)", -signal.SIGINT, "interrupted", "KeyboardInterrupt"),
        ("os._exit(4)", 4, "running", None),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "running", None),
    ],
    ids=["exception", "exit 3", "exit", "Ctrl-C", "_exit", "kill"],
)
def test_other_endings(tmp_path: Path, end: str, code: int, status: str, message: str | None, inside: bool) -> None:
    script = f"{LOOP}with tracker:\n    {end}" if inside else LOOP + end
    got, err = run(script, tmp_path)
    assert got == code, err
    if not inside and "exit" in end and "_exit" not in end:  # of which nothing is left to see when the process ends
        status, message = "interrupted", "the process ended before the tracker was closed"
    assert ending(tmp_path) == (status, message, 3)
    assert load_run(tmp_path / "run").is_alive is False


@pytest.mark.slow
def test_a_thread_that_trains_on_while_the_interpreter_ends(tmp_path: Path) -> None:
    script = f"""
import threading
def train():
{LOOP.replace(chr(10), chr(10) + "    ")}
    number = 4
    while True:
        train_step(model, optimizer, number)
        number += 1
        if number == 20:
            begun.set()
begun = threading.Event()
threading.Thread(target=train, daemon=True).start()
begun.wait()
time.sleep(float(sys.argv[1]))
"""
    for k in range(4):
        (folder := tmp_path / str(k)).mkdir()
        process = small_training.start(script, folder, str(0.01 * k))
        _, err = process.communicate(timeout=100)
        # torch itself aborts when its thread is stopped in the middle of a backward pass, tracked or not.
        assert process.returncode in (0, -signal.SIGABRT), err
        assert "Traceback" not in err and "tracker" not in err
        found = load_run(folder / "run")
        assert found.status == "interrupted"
        assert found.steps["step"].tolist() == list(range(1, len(found.steps) + 1))
        assert len(found.modules) == 2 * len(found.steps)
        assert len(found.steps) >= 19


def test_a_generator_that_trains_is_ended_with_the_interpreter(tmp_path: Path) -> None:
    script = """
def train():
    model = build()
    optimizer = optimize(model)
    with Tracker(model, optimizer, "run"):
        for number in range(1, 10):
            train_step(model, optimizer, number)
            yield number
losses = train()
for _ in range(3):
    next(losses)
"""
    code, err = run(script, tmp_path)
    assert (code, "Traceback" in err) == (0, False), err
    assert ending(tmp_path)[0] == "interrupted"
    assert ending(tmp_path)[2] == 3


def test_a_step_that_waits_for_its_epoch_is_written(tmp_path: Path) -> None:
    """The Trainer tells the epoch of a step after other callbacks, one of which meets a signal here."""
    script = """
import trainer_training
from pathlib import Path
from transformers import TrainerCallback
from linchain_analysis import TrackerCallback

class Killer(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

trainer_training.train(Path(), 6, None, [Killer(), TrackerCallback("run", quiet=True)])
"""
    code, err = run(script, tmp_path)
    assert code == -signal.SIGTERM, err
    assert ending(tmp_path) == ("interrupted", "SIGTERM", 4)
    found = load_run(tmp_path / "run")
    assert found.steps["epoch"].notna().tolist() == [True, True, True, False]
    assert found.modules["step"].value_counts().to_dict() == dict.fromkeys(range(1, 5), 4)


RANKS = """
import datetime
import torch.distributed as dist
dist.init_process_group("gloo")
pair = dist.new_group([0, 1], timeout=datetime.timedelta(minutes=5))
{loop}
if dist.get_rank() == 2:
    time.sleep(2)
    raise RuntimeError("this rank fails")
if dist.get_rank() == 1:
    time.sleep(100)
dist.all_reduce(torch.ones(1), group=pair)  # waits for a peer that does not come
"""


@pytest.mark.slow
def test_torchrun_ends_ranks_that_wait_for_a_peer(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(small_training.PRELUDE + RANKS.format(loop=LOOP))
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--standalone", "train.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(small_training.__file__).parent)},
    )
    assert done.returncode != 0
    print("torchrun took", time.monotonic() - begun)
    assert "Signal 9" not in done.stderr  # which comes after 30 seconds
    assert "this rank fails" in done.stderr
    assert ending(tmp_path) == ("interrupted", "SIGTERM", 3)


@pytest.mark.slow
def test_a_signal_at_any_moment(tmp_path: Path) -> None:
    """Also while the run is opened and while its tables become Parquet."""
    script = """
model = build()
optimizer = optimize(model)
print("ready", flush=True)
tracker = Tracker(model, optimizer, "run", quiet=True)
for number in range(1, 101):
    train_step(model, optimizer, number)
    print(number, flush=True)
tracker.close()
print("closed", flush=True)
"""
    rng = np.random.default_rng()
    seen = []
    for k in range(12):
        (folder := tmp_path / str(k)).mkdir()
        process = small_training.start(script, folder)
        assert process.stdout is not None
        last = "ready\n" if k % 3 == 0 else "100\n" if k % 3 == 1 else f"{rng.integers(1, 90)}\n"
        while (line := process.stdout.readline()) != last:
            assert line, process.communicate()[1]
        time.sleep(float(rng.random()) * 0.05)
        process.send_signal(signal.SIGTERM)
        rest, err = process.communicate(timeout=100)
        assert (process.returncode, "Traceback" in err) in ((-signal.SIGTERM, False), (0, False)), err
        numbers = [int(word) for word in rest.split() if word.isdigit()]
        printed = numbers[-1] if numbers else 0 if k % 3 == 0 else int(last)
        if not (folder / "run" / "manifest.json").exists():
            assert printed == 0
            continue
        found = load_run(folder / "run")
        seen.append((printed, len(found.steps), found.status))
        assert len(found.steps) >= printed
        assert found.steps["step"].tolist() == list(range(1, len(found.steps) + 1))
        assert len(found.modules) == 2 * len(found.steps)
        assert found.status == ("complete" if "closed" in rest else found.status)
    print(seen)
