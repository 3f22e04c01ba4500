"""Worker processes that stay alive between runs: importing torch and PEFT costs seconds, a small run hardly more.

The pool is our own and not `concurrent.futures`, whose executor breaks as a whole when one process dies: here the run
that took its worker down (out of memory, a fault in a kernel) has failed, and the others go on.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

from linchain_analysis.errors import LinchainError, RunError
from linchain_analysis.training.events import Event, RunFailed, RunFinished, RunStarted, RunStepped
from linchain_analysis.training.grid import PlannedRun
from linchain_analysis.training.settings import FinetuneSettings

REPORT_SECONDS = 0.2  # a worker tells of its steps at most this often
_STOP_SECONDS = 5.0

# One thread each: more would share the same cores, and sums over another number of threads round differently.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def work_through(
    runs: Sequence[PlannedRun], out: Path, *, num_workers: int, gpus: Sequence[str] = ()
) -> Generator[Event]:
    """Train `runs` in `num_workers` processes, each run into its folder under `out`, and yield what happens.

    Every run ends in a `RunFinished` or a `RunFailed`. Closing the iterator, or an exception in whoever consumes it
    (Ctrl-C), ends the workers; a run that was under way stays half-finished in its folder.

    Args:
        runs: What to train, in this order.
        out: Folder of runs. What workers print goes to `logs/worker-K.log` there.
        num_workers: Number of processes.
        gpus: Names of the GPUs as CUDA_VISIBLE_DEVICES has them; workers take them in turn, each one.

    Raises:
        RunError: If a worker cannot start.
    """
    waiting = deque(runs)
    (out / "logs").mkdir(exist_ok=True)
    workers = [_Worker(k, out, gpus) for k in range(1, min(num_workers, len(runs)) + 1)]
    try:
        while waiting or any(worker.run for worker in workers):
            for connection in wait([worker.connection for worker in workers]):
                worker = next(worker for worker in workers if worker.connection is connection)
                yield from worker.receive()
                if worker.is_dead:
                    workers.remove(worker)
                    if waiting:
                        workers.append(_Worker(worker.number, out, gpus))
                elif worker.is_idle and waiting:
                    yield worker.give(waiting.popleft())
    finally:
        for worker in workers:
            worker.dismiss()
        for worker in workers:
            worker.bury()


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, number: int, out: Path, gpus: Sequence[str]) -> None:
        self.number = number
        self.run: PlannedRun | None = None
        self.is_dead = False
        self._is_ready = False
        self._began = 0.0
        self._out = out
        self._log = out / "logs" / f"worker-{number}.log"
        context = multiprocessing.get_context("spawn")  # a forked torch can hang on locks its threads held
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, str(self._log)), name=f"worker-{number}", daemon=True
        )
        visible = {"CUDA_VISIBLE_DEVICES": gpus[(number - 1) % len(gpus)]} if gpus else {}
        with _environment({**_ENVIRONMENT, **visible}):
            self._process.start()
        theirs.close()  # ours would keep the pipe open after the process has died

    @property
    def is_idle(self) -> bool:
        return self._is_ready and self.run is None

    def give(self, run: PlannedRun) -> Event:
        self.run = run
        self._began = time.monotonic()
        with suppress(OSError):  # it has died in the meantime, and the next `receive` says so
            self.connection.send((run.settings, str(self._out / run.name)))
        return RunStarted(self.number, run.name)

    def receive(self) -> Iterator[Event]:
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            yield from self._report_death()
            return
        if message == "ready":
            self._is_ready = True
            return
        assert self.run is not None
        name = self.run.name
        kind, content = message
        if kind == "step":
            yield RunStepped(self.number, name, *content)
            return
        self.run = None
        if kind == "finished":
            yield RunFinished(self.number, name, time.monotonic() - self._began)
        else:
            yield RunFailed(self.number, name, content, str(self._log))

    def _report_death(self) -> Iterator[Event]:
        self.is_dead = True
        self._process.join(_STOP_SECONDS)
        code = self._process.exitcode
        how = f"signal {-code} ({signal.strsignal(-code)})" if code is not None and code < 0 else f"exit code {code}"
        self.connection.close()
        if not self._is_ready:
            raise RunError(f"worker {self.number}", expected="a process that starts", got=how, do=f"read {self._log}")
        if self.run is not None:
            yield RunFailed(self.number, self.run.name, f"its process died: {how}", str(self._log))
            self.run = None

    def dismiss(self) -> None:
        """Tell the process to end: one that waits for work sees the end of the pipe, any other gets a signal."""
        if not self.is_idle:
            self._process.terminate()
        self.connection.close()

    def bury(self) -> None:
        """Wait for the end of the process, and make it where it does not come."""
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for as long as a process is being started: a child has read them before it imports."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _serve(connection: Connection, log: str) -> None:
    """Run in the worker: train what comes, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, _leave)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (lives as long as the process)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable()

    import torch

    from linchain_analysis.training.preparation import PreparedProblem, prepare
    from linchain_analysis.training.trainer import finetune

    torch.set_num_threads(1)
    connection.send("ready")
    prepared: dict[object, PreparedProblem] = {}
    while True:
        try:
            settings, path = connection.recv()
        except (EOFError, OSError):
            return
        print(f"--- {path}", flush=True)
        try:
            key = _identify_problem(settings)
            if key not in prepared:
                prepared.clear()  # one model's worth of records in memory is enough
                prepared[key] = prepare(settings)
            finetune(settings, path, prepared=prepared[key], on_step=_Throttle(connection))
            answer = ("finished", "")
        except BrokenPipeError:
            return  # the parent is gone, and nobody waits for this run
        except Exception as error:
            traceback.print_exc()
            kind = "" if isinstance(error, LinchainError) else f"{type(error).__name__}: "
            answer = ("failed", kind + " ".join(str(error).split()))
        connection.send(answer)


def _leave(*_: object) -> None:
    """End the process as an exception does, so that the run under way is closed as interrupted."""
    raise SystemExit(128 + signal.SIGTERM)


def _identify_problem(settings: FinetuneSettings) -> object:
    return settings.problem, settings.model, settings.data, settings.template, settings.num_eval, settings.bf16


class _Throttle:
    """Sends steps home, but seldom: a display that changes five times a second is enough."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last = 0.0

    def __call__(self, step: int, num_steps: int, loss: float | None) -> None:
        now = time.monotonic()
        if step in (1, num_steps) or now - self._last >= REPORT_SECONDS:
            self._last = now
            self._connection.send(("step", (step, num_steps, loss)))
