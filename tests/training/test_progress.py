from __future__ import annotations

import io
import re

from rich.console import Console

from linchain_analysis.training.events import Event, RunFailed, RunFinished, RunStarted, RunStepped
from linchain_analysis.training.progress import Bars, Lines


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def write_lines(events: list[tuple[float, Event]], *, num_runs: int, num_complete: int = 0) -> list[str]:
    """Return what `Lines` writes of events that happen at the given seconds after the start."""
    clock, lines = Clock(), list[str]()
    with Lines(lines.append, seconds=10, clock=clock).open(num_runs=num_runs, num_complete=num_complete) as show:
        for at, event in events:
            clock.now = 100.0 + at
            show(event)
    return lines


def test_lines_tell_start_end_and_the_time_left() -> None:
    lines = write_lines(
        [
            (0, RunStarted(1, "a")),
            (1, RunStarted(2, "b")),
            (9, RunStepped(2, "b", 3, 6, 1.0)),
            (30, RunFinished(1, "a", 30.0)),
            (40, RunFailed(2, "b", "no memory", "logs/worker-2.log")),
        ],
        num_runs=6,
        num_complete=2,
    )
    # One and a half runs in 30 s leave 2.5 for 50 s; two in 40 s leave 2 for 40 s. Runs of before tell no pace.
    assert lines == [
        "2 of 6 runs are complete already",
        "a started (worker 1)",
        "b started (worker 2)",
        "[3/6] a finished in 30.0 s, about 50.0 s left",
        "[4/6] b failed: no memory, about 40.0 s left",
    ]


def test_runs_that_are_done_at_once_count_as_many() -> None:
    lines = write_lines(
        [
            (0, RunStarted(1, "a and 5 more", 6)),
            (5, RunStepped(1, "a and 5 more", 20, 40, None)),
            (10, RunFailed(1, "c", "no space", "")),
            (20, RunFinished(1, "a and 5 more", 20.0, 5)),
        ],
        num_runs=12,
        num_complete=2,
    )
    # Six runs in 20 s leave four for 13.3 s.
    assert lines[-2:] == [
        "[3/12] c failed: no space, about 1 min 30 s left",
        "[8/12] a and 5 more finished in 20.0 s, about 13.3 s left",
    ]
    clock = Clock()
    with Lines(lines.append, clock=clock).open(num_runs=12, num_complete=0) as show:
        show(RunStarted(1, "a and 5 more", 6))
        show(RunStarted(2, "b"))
        show(RunStepped(1, "a and 5 more", 20, 40, None))
        clock.now += 8
        show(RunFinished(2, "b", 8.0))
    assert lines[-1] == "[1/12] b finished in 8.0 s, about 16.0 s left"  # one run and half of six in 8 s


def test_lines_tell_of_steps_at_intervals_only() -> None:
    steps = [(float(second), RunStepped(1, "a", second, 60, 2.0 / second)) for second in range(1, 26)]
    lines = write_lines([(0.0, RunStarted(1, "a")), *steps], num_runs=1)
    assert lines == ["a started", "a step 10/60 loss 0.2", "a step 20/60 loss 0.1"]


def test_a_step_before_the_first_known_loss_is_told_without_one() -> None:
    lines = write_lines([(0, RunStarted(1, "a")), (11, RunStepped(1, "a", 1, 60, None))], num_runs=1)
    assert lines[-1] == "a step 1/60"


def test_bars_show_the_grid_the_runs_and_what_failed() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with Bars(console).open(num_runs=3, num_complete=1) as show:
        show(RunStarted(1, "first"))
        show(RunStarted(2, "slow"))
        show(RunStepped(2, "slow", 7, 9, 0.5))
        show(RunFinished(1, "first", 2.0))
        show(RunStarted(1, "second"))
        show(RunFailed(1, "second", "the [bold] end", "log"))
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in stream.getvalue().splitlines()]
    assert "second failed: the [bold] end" in lines
    runs, slow = (next(line for line in reversed(lines) if line.startswith(name)) for name in ("runs", "slow"))
    assert "3/3" in runs
    assert "7/9" in slow and "loss 0.5" in slow
    assert not any(line.startswith("first") for line in lines[-3:])  # its bar is now the second's
