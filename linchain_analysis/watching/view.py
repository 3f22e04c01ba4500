"""What is shown of a run, as plain numbers: what they are is here, how they look is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NAN = float("nan")
WINDOW = 50  # steps that the smoothed loss and the speed are taken over


@dataclass(frozen=True)
class KindRank:
    """Effective rank of delta over the modules of one kind.

    Attributes:
        kind: Last part of the modules' names.
        median: Over the modules where it is defined, at the last step that has any; NaN without one.
        low: The smallest of these.
        high: The largest.
        medians: The median at each recorded step, NaN where there is none.
    """

    kind: str
    median: float
    low: float
    high: float
    medians: Array


@dataclass(frozen=True)
class Finding:
    """Something that the health report found and that holds still."""

    finding: str
    subject: str
    step: int
    message: str


@dataclass(frozen=True)
class Evaluation:
    """The last value of one metric on one split."""

    split: str
    metric: str
    step: int
    value: float


@dataclass(frozen=True)
class StepsView:
    """What the table `steps` says.

    Attributes:
        step: Number of the last step, 0 before the first.
        num_rows: How many steps have a row.
        losses: Of every step.
        loss: Of the last step.
        loss_mean: Mean of those of the last `WINDOW` steps that are finite.
        learning_rate: Of the last step.
        grad_norm: Of the last step, before clipping.
        clipped_share: Share of the steps whose gradients clipping made smaller, among those where that is known.
        num_skipped: How many steps the gradient scaler left out.
        steps_per_second: Over the last `WINDOW` steps.
        seconds: All steps together.
        track_milliseconds: Median of what tracking took of a step.
        track_share: What tracking took of all the time.
    """

    step: int = 0
    num_rows: int = 0
    losses: Array = field(default_factory=lambda: np.zeros(0))
    loss: float = NAN
    loss_mean: float = NAN
    learning_rate: float = NAN
    grad_norm: float = NAN
    clipped_share: float = NAN
    num_skipped: int = 0
    steps_per_second: float = NAN
    seconds: float = NAN
    track_milliseconds: float = NAN
    track_share: float = NAN


@dataclass(frozen=True)
class RunView:
    """One run at one moment.

    Attributes:
        name: What it is called.
        status: `reading`, `starting`, `running`, `died`, `complete`, `failed`, `interrupted` or `damaged`.
        message: Why, where there is more to say.
        is_over: Whether nothing more will come.
        method: What is trained.
        problem: What is learned.
        preset: What is recorded.
        started: When it began, ISO 8601.
        num_steps: How many steps it is going to have, None where that is not known.
        quiet_seconds: Of a running run, how long ago a step ended.
        steps: What the table `steps` says.
        ranks: Effective rank by kind of module, in the order of the model.
        rank: Median of the effective rank over all modules, at the last step that has any.
        ratios: Median of the update ratio over the modules of a kind, by kind and factor, at the last recorded step.
        ratio: The same over all modules and factors.
        is_examined: Whether there is a health report.
        findings: What it says that holds now, the latest first.
        evals: Last values.
    """

    name: str
    status: str = "starting"
    message: str | None = None
    is_over: bool = False
    method: str | None = None
    problem: str | None = None
    preset: str = ""
    started: str = ""
    num_steps: int | None = None
    quiet_seconds: float = NAN
    steps: StepsView = field(default_factory=StepsView)
    ranks: tuple[KindRank, ...] = ()
    rank: float = NAN
    ratios: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    ratio: float = NAN
    is_examined: bool = False
    findings: tuple[Finding, ...] = ()
    evals: tuple[Evaluation, ...] = ()

    @property
    def seconds_left(self) -> float:
        """How long the rest takes at the present speed; NaN where the length is not known or the run is over."""
        if self.num_steps is None or self.status != "running":
            return NAN
        return max(self.num_steps - self.steps.step, 0) / self.steps.steps_per_second
