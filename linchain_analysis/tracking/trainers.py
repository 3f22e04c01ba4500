"""What transformers' Trainer tells of a training, passed on to its tracker: by the callback and by the launcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linchain_analysis.tracking.tracker import Tracker

# What the Trainer reports with an evaluation that is not a metric of the model.
_COUNTS = ("num_input_tokens_seen", "total_flos")
_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


class TrainerEvents:
    """Follows one Trainer through its trainings, each of which is a run of its own.

    Attributes:
        tracker: Of the last training; None before the first, and where it is not tracked.
        trains: Whether a training has begun and not ended.
    """

    def __init__(self) -> None:
        self.tracker: Tracker | None = None
        self.trains = False
        self._early: list[dict[str, Any]] = []  # metrics of evaluations before training, which belong to step 0

    def train_begins(self, args: Any, state: Any, make_tracker: Callable[[Mapping[str, Any]], Tracker | None]) -> None:
        """Start a run.

        Args:
            args: The Trainer's arguments.
            state: Its state.
            make_tracker: Takes what they say as arguments of `Tracker`; returns None where this is not tracked.
        """
        if self.tracker:
            self.tracker.close("interrupted", "training began anew")
        self.tracker = make_tracker(
            {
                "base_learning_rate": args.learning_rate,
                "init_seed": args.seed,
                "data_seed": args.seed if args.data_seed is None else args.data_seed,
                "num_steps": state.max_steps,
                "deferred": True,
                "resume": state.global_step or False,
            }
        )
        self.trains = True
        early, self._early = self._early, []
        for metrics in early if not state.global_step else ():  # not yet of the weights of the checkpoint
            self.evaluated(metrics)

    def step_ends(self, state: Any) -> None:
        """Complete the step with the Trainer's epoch and token count."""
        if self.tracker:
            known = {"epoch": float(state.epoch)} if state.epoch is not None else {}
            if state.num_input_tokens_seen:
                known["tokens"] = int(state.num_input_tokens_seen)
            self.tracker.complete_step(**known)

    def evaluated(self, metrics: Any) -> None:
        """Keep the metrics of an evaluation or a prediction, named `split_metric`."""
        if not metrics:
            return
        if not self.tracker:
            if not self.trains:
                self._early.append(dict(metrics))
            return
        by_split: dict[str, dict[str, float]] = {}
        for key, value in metrics.items():
            split, _, metric = str(key).partition("_")
            if key in _COUNTS or metric.endswith(_SPEED):
                continue
            if metric and isinstance(value, (int, float)):
                by_split.setdefault(split, {})[metric] = value
        for split, found in by_split.items():
            self.tracker.log_eval(split, **found)

    def train_ends(self, *, close: bool = True) -> None:
        """End the run with the training."""
        self.trains = False
        if self.tracker and close:
            self.tracker.close()

    def hear(self, event: str, state: Any, more: Mapping[str, Any]) -> None:
        """Take an event of a training that has begun, as a Trainer's callback handler passes it on."""
        if event == "on_step_end":
            self.step_ends(state)
        elif event in ("on_evaluate", "on_predict"):
            self.evaluated(more.get("metrics"))
        elif event == "on_train_end":
            self.train_ends()
