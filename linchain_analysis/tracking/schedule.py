"""When to record: a function step → bool, given as a number, a function, or a budget for the log."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from linchain_analysis.errors import InputError

Every = int | str | Callable[[int], bool]
LOG_BUDGET_BYTES = 200_000_000
_LONGEST_RUN = 10_000_000  # steps that a run of unknown length is prepared for
# Share of a budget for what is written when nobody asks any more: the rows of `steps` after the last step that was
# recorded whole, the end of the manifest, footers.
_KEPT_BACK = 0.01
_DENSE_STEPS = 100  # the start of a run, where most happens, is always recorded whole


class Schedule(Protocol):
    """Decides which steps are recorded."""

    def wants(self, step: int, bytes_written: int) -> bool:
        """Return whether `step` (counted from 1) is recorded, `bytes_written` to the log so far."""

    def go_on(self, recorded: Sequence[int], bytes_before: int) -> None:
        """Decide as if this had seen the steps of a run that goes on.

        Args:
            recorded: Those that were recorded whole.
            bytes_before: What its log has taken so far.
        """


class EveryN:
    """The steps n, 2 n, 3 n, …, which are those a Trainer with `logging_steps=n` logs."""

    def __init__(self, n: int) -> None:
        self._n = n

    def wants(self, step: int, bytes_written: int) -> bool:  # noqa: D102
        return step % self._n == 0

    def go_on(self, recorded: Sequence[int], bytes_before: int) -> None:  # noqa: D102
        pass


class Chosen:
    """The steps a given function says."""

    def __init__(self, choose: Callable[[int], bool]) -> None:
        self._choose = choose

    def wants(self, step: int, bytes_written: int) -> bool:  # noqa: D102
        return bool(self._choose(step))

    def go_on(self, recorded: Sequence[int], bytes_before: int) -> None:  # noqa: D102
        pass


class Budget:
    """Every step at first, then thinned so that the log stays under a budget.

    Where the number of steps is known, what is left of the budget is spread evenly over what is left of the run.
    Where it is not, every step is recorded until half of the budget is used, and the other half is spread evenly over
    the logarithm of the step, so that any length fits.
    """

    def __init__(self, budget_bytes: int = LOG_BUDGET_BYTES, num_steps: int | None = None) -> None:
        self._budget = (1 - _KEPT_BACK) * budget_bytes
        self._num_steps = num_steps
        self._num_recorded = 0
        self._next = 1
        self._bytes_before = 0

    def wants(self, step: int, bytes_written: int) -> bool:  # noqa: D102
        bytes_written += self._bytes_before
        if step < self._next or bytes_written + self._bytes_per_record(bytes_written) > self._budget:
            return False
        self._next = step + self._stride(step, bytes_written)
        self._num_recorded += 1
        return True

    def go_on(self, recorded: Sequence[int], bytes_before: int) -> None:  # noqa: D102
        self._bytes_before = bytes_before
        if recorded:
            self._num_recorded = len(recorded)
            self._next = recorded[-1] + self._stride(recorded[-1], bytes_before)

    def _bytes_per_record(self, bytes_written: int) -> float:
        """What a recorded step took so far with all that came until the next one; 0 before the first."""
        return bytes_written / self._num_recorded if self._num_recorded else 0.0

    def _stride(self, step: int, bytes_written: int) -> int:
        if step <= _DENSE_STEPS:
            return 1
        bytes_per_record = max(self._bytes_per_record(bytes_written), 1.0)
        records_left = max((self._budget - bytes_written) / bytes_per_record, 1.0)
        if self._num_steps is not None and step <= self._num_steps:
            return math.ceil((self._num_steps - step + 1) / records_left)
        if bytes_written < self._budget / 2:
            return 1
        return math.ceil(step * math.log(max(_LONGEST_RUN / step, math.e)) / records_left)


def parse_every(every: Every, num_steps: int | None = None, budget_bytes: int = LOG_BUDGET_BYTES) -> Schedule:
    """Return the schedule that `every` names: an int, a function step → bool, or "auto"."""
    if isinstance(every, str) and every.isdigit():
        every = int(every)
    if every == "auto":
        return Budget(budget_bytes, num_steps)
    if isinstance(every, int) and not isinstance(every, bool) and every >= 1:
        return EveryN(every)
    if callable(every):
        return Chosen(every)
    raise InputError(
        "every", expected='a number ≥ 1, a function step → bool or "auto"', got=repr(every), do="pass one of these"
    )


def describe_every(every: Every) -> str:
    """Return `every` as the manifest keeps it."""
    return getattr(every, "__name__", "a function") if callable(every) else str(every)
