"""Show how a grid gets on: bars on a terminal, lines everywhere else (a CI log, a pipe, a notebook)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import rich.progress
from rich.console import Console

from linchain_analysis.training.events import Event, RunFailed, RunFinished, RunStarted, RunStepped

Show = Callable[[Event], None]

LINE_SECONDS = 10.0  # a line about the running runs at most this often


class Progress(Protocol):
    """Something that shows events of a grid."""

    def open(self, *, num_runs: int, num_complete: int) -> AbstractContextManager[Show]:
        """Begin showing `num_runs` runs, of which `num_complete` were complete before."""
        ...


def show_progress() -> Progress:
    """Return bars where stdout is a terminal, else lines."""
    console = Console()
    return Bars(console) if console.is_terminal else Lines()


class Bars:
    """One bar for the grid and one for the run of each worker."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def open(self, *, num_runs: int, num_complete: int) -> Iterator[Show]:
        """Show bars until the context ends."""
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=self._console) as bars:
            # A grid of one run needs no bar of its own beside the bar of that run.
            total = bars.add_task("runs", total=num_runs, completed=num_complete, note="", visible=num_runs > 1)
            of_worker: dict[int, rich.progress.TaskID] = {}
            work = _Work(num_complete)

            def show(event: Event) -> None:
                work.count(event)
                bars.update(total, completed=work.amount)  # the column shows its whole part
                match event:
                    case RunStarted(worker, name):
                        if worker in of_worker:
                            bars.remove_task(of_worker[worker])
                        of_worker[worker] = bars.add_task(name, total=None, note="")
                    case RunStepped(worker, _, step, num_steps, loss):
                        bars.update(of_worker[worker], completed=step, total=num_steps, note=_tell_loss(loss))
                    case RunFailed(_, name, error, _):
                        bars.console.print(f"{name} failed: {error}", style="red", markup=False, highlight=False)

            yield show


class Lines:
    """A line when a run starts and ends, and at intervals one for each that is running."""

    def __init__(
        self,
        write: Callable[[str], None] | None = None,
        *,
        seconds: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = (lambda line: print(line, flush=True)) if write is None else write
        self._seconds = seconds
        self._clock = clock

    @contextmanager
    def open(self, *, num_runs: int, num_complete: int) -> Iterator[Show]:
        """Write lines until the context ends."""
        began = self._clock()
        work = _Work(num_complete)
        written: dict[int, float] = {}
        if num_complete:
            self._write(f"{num_complete} of {num_runs} runs are complete already")

        def show(event: Event) -> None:
            now = self._clock()
            work.count(event)
            match event:
                case RunStarted(worker, name):
                    written[worker] = now
                    self._write(f"{name} started" + (f" (worker {worker})" if num_runs > 1 else ""))
                case RunStepped(worker, name, step, num_steps, loss):
                    if now - written[worker] >= self._seconds:
                        written[worker] = now
                        self._write(f"{name} step {step}/{num_steps} {_tell_loss(loss)}".rstrip())
                case RunFinished() | RunFailed():
                    left = (now - began) / (work.amount - num_complete) * (num_runs - work.amount)
                    rest = f", about {_tell_time(left)} left" if left else ""
                    how = (
                        f"finished in {_tell_time(event.seconds)}"
                        if isinstance(event, RunFinished)
                        else f"failed: {event.error}"
                    )
                    self._write(f"[{work.num_done}/{num_runs}] {event.name} {how}{rest}")

        yield show


class _Work:
    """How many runs' worth of work is done: whole runs, and the part of each that is under way."""

    def __init__(self, num_complete: int) -> None:
        self.num_done = num_complete
        self._parts: dict[int, float] = {}
        self._sizes: dict[int, int] = {}  # runs that a worker does at once

    @property
    def amount(self) -> float:
        return self.num_done + sum(self._sizes.get(worker, 1) * part for worker, part in self._parts.items())

    def count(self, event: Event) -> None:
        match event:
            case RunStarted(worker):
                self._parts[worker], self._sizes[worker] = 0.0, event.num_runs
            case RunStepped(worker, _, step, num_steps):
                self._parts[worker] = step / num_steps
            case RunFinished(worker):
                self._parts[worker] = 0.0
                self.num_done += event.num_runs
            case RunFailed(worker):
                self._parts[worker] = 0.0
                self.num_done += 1


def _tell_loss(loss: float | None) -> str:
    return "" if loss is None else f"loss {loss:.4g}"


def _tell_time(seconds: float) -> str:
    whole = round(seconds)
    return f"{seconds:.1f} s" if seconds < 60 else f"{whole // 60} min {whole % 60} s"
