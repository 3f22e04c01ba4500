"""Whoever looks at each finished step besides the run folder: the health report, mirrors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from linchain_analysis.probes import Reading


@dataclass(frozen=True)
class FinishedStep:
    """One step as it is written.

    Attributes:
        step: Its number.
        values: `loss learning_rate grad_norm clip_coef skipped seconds`, as in the table `steps`.
        reading: What was read of the chains; None in a step that is not recorded whole. It is valid until the next
            step.
    """

    step: int
    values: Mapping[str, float]
    reading: Reading | None


class Observer(Protocol):
    """Told of each step. What it raises ends it alone, with a warning."""

    @property
    def name(self) -> str:
        """What a warning calls it."""

    def see(self, finished: FinishedStep) -> None:
        """A step has ended and its rows are written, or wait to be completed."""

    def close(self) -> None:
        """The run ends."""
