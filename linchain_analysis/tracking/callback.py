"""The tracker as a callback of transformers' Trainer (and of trainers built on it, such as TRL's)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback as HubTrainerCallback

from linchain_analysis.tracking.presets import select
from linchain_analysis.tracking.schedule import Every, parse_every
from linchain_analysis.tracking.tracker import Tracker
from linchain_analysis.tracking.trainers import TrainerEvents


class TrackerCallback(HubTrainerCallback):  # type: ignore[misc, unused-ignore]
    """Tracks the training of a Trainer into a run folder.

    Metrics of evaluations go to the table `evals`, also of those made after training.

    Args:
        path: The run folder.
        preset: As in `Tracker`.
        every: As in `Tracker`; by default every step at first, then thinned to a log of 200 MB.
        method: As in `Tracker`.
        problem: As in `Tracker`.
        base_learning_rate: The Trainer's where it is not said.
        init_seed: The Trainer's `seed` where it is not said.
        data_seed: The Trainer's `data_seed`, else its `seed`, where it is not said.
        close_on_train_end: Whether the run ends with the training, or when `close` is called.
        options: Further arguments of `Tracker`: `measures`, `sample_every`, `snapshot_every`, `include`, `exclude`,
            `report_to`, `resume`, `gradients`, `extra`, `log_budget_bytes`, `strict`, `quiet`. A Trainer that resumes
            from a checkpoint goes on with the run in `path`, unless `resume` is False.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        preset: str | None = None,
        every: Every = "auto",
        method: str | None = None,
        problem: str | None = None,
        base_learning_rate: float | None = None,
        init_seed: int | None = None,
        data_seed: int | None = None,
        close_on_train_end: bool = True,
        **options: Any,
    ) -> None:
        select(preset, options.get("measures"))
        parse_every(every)
        self.path = Path(path)
        self._given_path = self.path
        self._events = TrainerEvents()
        self._base_learning_rate = base_learning_rate
        self._init_seed = init_seed
        self._data_seed = data_seed
        self._close_on_train_end = close_on_train_end
        self._options = {"preset": preset, "every": every, "method": method, "problem": problem, **options}

    @property
    def tracker(self) -> Tracker | None:
        """The tracker of the last training, None before the first."""
        return self._events.tracker

    def close(self, status: str = "complete", message: str | None = None) -> None:
        """End the run now."""
        if self.tracker:
            self.tracker.close(status, message)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start tracking the Trainer's model and optimiser."""
        self._events.train_begins(
            args, state, lambda known: self._make_tracker(kwargs["model"], kwargs["optimizer"], known)
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the step with the Trainer's epoch and token count."""
        self._events.step_ends(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the metrics of an evaluation."""
        self._events.evaluated(kwargs.get("metrics"))

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        """Keep the metrics of a prediction."""
        self._events.evaluated(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run with the training."""
        self._events.train_ends(close=self._close_on_train_end)

    def _make_tracker(self, model: Any, optimizer: Any, known: Mapping[str, Any]) -> Tracker:
        said = {
            "base_learning_rate": self._base_learning_rate,
            "init_seed": self._init_seed,
            "data_seed": self._data_seed,
        }
        said = {name: value for name, value in said.items() if value is not None}
        tracker = Tracker(model, optimizer, self._given_path, **{**known, **self._options, **said})
        self.path = tracker.path
        return tracker
