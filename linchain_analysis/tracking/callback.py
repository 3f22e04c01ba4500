"""The tracker as a callback of transformers' Trainer (and of trainers built on it, such as TRL's)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback as HubTrainerCallback

from linchain_analysis.tracking.presets import select
from linchain_analysis.tracking.schedule import Every, parse_every
from linchain_analysis.tracking.tracker import Tracker

# What the Trainer reports with an evaluation that is not a metric of the model.
_COUNTS = ("num_input_tokens_seen", "total_flos")
_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


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
        self.tracker: Tracker | None = None
        self._given_path = self.path
        self._early: list[dict[str, Any]] = []  # metrics of evaluations before training, which belong to step 0
        self._base_learning_rate = base_learning_rate
        self._init_seed = init_seed
        self._data_seed = data_seed
        self._close_on_train_end = close_on_train_end
        self._options = {"preset": preset, "every": every, "method": method, "problem": problem, **options}

    def close(self, status: str = "complete", message: str | None = None) -> None:
        """End the run now."""
        if self.tracker:
            self.tracker.close(status, message)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start tracking the Trainer's model and optimiser."""
        if self.tracker:
            self.tracker.close("interrupted", "training began anew")
        data_seed = args.seed if args.data_seed is None else args.data_seed
        self.tracker = Tracker(
            kwargs["model"],
            kwargs["optimizer"],
            self._given_path,
            base_learning_rate=args.learning_rate if self._base_learning_rate is None else self._base_learning_rate,
            init_seed=args.seed if self._init_seed is None else self._init_seed,
            data_seed=data_seed if self._data_seed is None else self._data_seed,
            num_steps=state.max_steps,
            deferred=True,
            **{"resume": state.global_step or False, **self._options},
        )
        self.path = self.tracker.path
        early, self._early = self._early, []
        for metrics in early:
            self._keep(metrics)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the step with the Trainer's epoch and token count."""
        if self.tracker:
            known = {"epoch": float(state.epoch)} if state.epoch is not None else {}
            if state.num_input_tokens_seen:
                known["tokens"] = int(state.num_input_tokens_seen)
            self.tracker.complete_step(**known)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the metrics of an evaluation."""
        self._keep(kwargs.get("metrics"))

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        """Keep the metrics of a prediction."""
        self._keep(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run with the training."""
        if self._close_on_train_end:
            self.close()

    def _keep(self, metrics: Any) -> None:
        if not metrics:
            return
        if not self.tracker:
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
