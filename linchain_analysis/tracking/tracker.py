"""The tracker for a raw training loop, and what the other ways in are built on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from linchain_analysis.errors import InputError
from linchain_analysis.probes import choose_chains, find_chains, name_method
from linchain_analysis.runs import Manifest, RunWriter, append_evals
from linchain_analysis.tracking.interception import Watch, unwrap_optimizer
from linchain_analysis.tracking.lifetime import OPEN, describe_ending, logger, writes_here
from linchain_analysis.tracking.measuring import Measuring
from linchain_analysis.tracking.mirrors import check_mirrors, open_mirrors
from linchain_analysis.tracking.observers import Observer
from linchain_analysis.tracking.presets import SAMPLE_EVERY, check_intervals, check_patterns, select
from linchain_analysis.tracking.recorder import Recorder
from linchain_analysis.tracking.resumption import Resume, check_resume, open_run
from linchain_analysis.tracking.rows import module_records
from linchain_analysis.tracking.schedule import LOG_BUDGET_BYTES, Every, describe_every, parse_every


class Tracker:
    """Records what every step of an optimiser does to the adapted layers of a model.

    It reads and never writes: weights, optimiser state, random streams and outputs are the same with and without it.
    A fault in here is reported once, tracking ends, and training goes on.

    Args:
        model: Holds the adapted layers: a PEFT model, or a model that contains one.
        optimizer: Trains them; wrappers such as Accelerate's are looked through.
        path: The run folder. Where it holds a run already, the next free name beside it is taken and said.
        preset: `light` (norms), `standard` (norms, cosines, spectra of delta and of its update) or `full` (adds
            interaction orders, balance, conditioning, preconditioner, gradient capture and snapshots of the cores).
            Where neither this nor `measures` is given, `standard`.
        measures: Names of measures, or of their columns, or functions marked as measures, to be recorded with norms,
            and with what `preset` records where that is given too; `python -m linchain_analysis.audit --list` shows
            them.
        every: Which steps are recorded whole: an int (each n-th), a function step → bool, or "auto" (every step at
            first, then thinned so that the log stays under `log_budget_bytes`). The table `steps` is complete anyway.
        method: Name of the method for comparisons; guessed from the adapter where it is not said.
        problem: Name of what is learned.
        base_learning_rate: The learning rate before scheduling; the optimiser's at the start where it is not said.
        init_seed: Seed of the initialisation.
        data_seed: Seed of the order of the data.
        sample_every: Measures too dear for every step are taken at the first recorded step, and then at the first one
            at least so many steps later.
        snapshot_every: The same for snapshots of the small cores, from which measures can be computed afterwards; by
            default 50 for `full`, thinned to stay under half of `log_budget_bytes`, and none otherwise.
        include: Only modules whose name this regular expression is found in are recorded.
        exclude: Modules whose name this one is found in are not.
        report_to: Where scalars are mirrored besides: `tensorboard`, `wandb`, `trackio`, or several of them.
        resume: What becomes of a run that `path` holds already. None: it is gone on with if this is the same training,
            resumed from a checkpoint (the same modules, and the optimiser's state and the weights stand at one of its
            steps); later steps are then superseded. A step: the same, for optimisers that do not count. False: never.
        gradients: `cores`, or `full` to keep the gradients of A and B whole in snapshots.
        extra: Anything else for the manifest, JSON-able.
        num_steps: Length of the run where it is known, for `every="auto"`.
        log_budget_bytes: For `every="auto"`.
        strict: Raise faults of the tracker instead of reporting them.
        quiet: Whether to leave out the line on standard error that says, at the end, what tracking cost.
        deferred: Whether the rows of a step wait until `complete_step` says what only the training loop knows.

    Raises:
        InputError: An argument that cannot be meant.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        path: str | Path,
        *,
        preset: str | None = None,
        measures: Sequence[str | Callable[..., Any]] | None = None,
        every: Every = 1,
        method: str | None = None,
        problem: str | None = None,
        base_learning_rate: float | None = None,
        init_seed: int | None = None,
        data_seed: int | None = None,
        sample_every: int = SAMPLE_EVERY,
        snapshot_every: int | None = None,
        include: str | None = None,
        exclude: str | None = None,
        report_to: str | Sequence[str] = (),
        resume: Resume = None,
        gradients: str = "cores",
        extra: Mapping[str, Any] | None = None,
        num_steps: int | None = None,
        log_budget_bytes: int = LOG_BUDGET_BYTES,
        strict: bool = False,
        quiet: bool = False,
        deferred: bool = False,
    ) -> None:
        self.path = Path(path)
        self._strict = strict
        self._quiet = quiet
        self._writer: RunWriter | None = None
        self._recorder: Recorder | None = None
        self._watch: Watch | None = None
        self._waiting: list[tuple[int, str, Any]] = []  # logged before the first step, or still on a device
        self._observers: list[Observer] = []
        self._closed = False
        self._num_steps = 0
        self._process = os.getpid()
        chosen = select(preset, measures)
        shared = chosen.snapshots and snapshot_every is None  # then snapshots take half of the budget
        schedule = parse_every(every, num_steps, log_budget_bytes // 2 if shared else log_budget_bytes)
        check_intervals(sample_every, snapshot_every, gradients)
        check_patterns(include, exclude)
        check_resume(resume)
        mirrors = check_mirrors(report_to)
        inner = unwrap_optimizer(optimizer)
        _check(model, inner)
        try:
            if not writes_here():
                return
            chains = choose_chains(found := find_chains(model, inner), include, exclude)
            self._report_chains(chains, len(found))
            measuring = Measuring(
                chosen,
                chains,
                sample_every=sample_every,
                snapshot_every=snapshot_every,
                snapshot_budget=log_budget_bytes // 2,
                whole_gradients=gradients == "full",
                strict=strict,
            )
            manifest = Manifest(
                command=tuple(sys.argv),
                method=method or name_method(model),
                problem=problem,
                preset=chosen.name,
                every=describe_every(every),
                base_learning_rate=_first_rate(inner) if base_learning_rate is None else base_learning_rate,
                init_seed=init_seed,
                data_seed=data_seed,
                modules=module_records(chains),
                extra=dict(extra or {}),
                measures=tuple(measure.name for measure in chosen.measures),
                columns=measuring.columns(),
                num_steps=num_steps,
            )
            opened = open_run(self.path, manifest, chains, inner, resume)
            self._writer, self.path, self._num_steps = opened.writer, opened.writer.path, opened.num_steps
            self._observers = open_mirrors(mirrors, chains, opened.writer.manifest, self.path)
            self._recorder = Recorder(
                inner,
                chains,
                self._writer,
                measuring,
                schedule,
                deferred=deferred,
                fail=self._fail,
                observers=self._observers,
                num_steps=opened.num_steps,
                start=opened.start,
            )
            self._watch = Watch(self._recorder)
            OPEN.add(self)
        except Exception as error:
            self._fail(error)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(error)

    @property
    def num_steps(self) -> int:
        """How many optimiser steps have ended since tracking began."""
        return self._recorder.num_steps if self._recorder else self._num_steps

    def log(self, **values: float | Tensor) -> None:
        """Add scalars to the last finished step, or to the first one if none has finished.

        A name that is a column of `steps`, such as `loss`, overrides what the tracker saw there. Tensors stay on
        their device until the next step ends, so that nothing waits for it here.

        Args:
            values: Numbers or one-element tensors, by name.
        """
        try:
            for name, value in values.items():
                if name in ("step", "skipped"):
                    raise InputError("log", expected="a name that tracking does not own", got=name, do="rename it")
                self._waiting.append((self.num_steps, name, _checked_scalar(name, value)))
            self._flush_log(ready_only=True)
        except Exception as error:
            self._report("log", error)

    def log_eval(self, split: str, **metrics: float | Tensor) -> None:
        """Add the metrics of one evaluation on `split`, after the last finished step; also after the run has ended."""
        try:
            rows: dict[str, list[Any]] = {
                "step": [self.num_steps] * len(metrics),
                "split": [split] * len(metrics),
                "metric": list(metrics),
                "value": [float(_checked_scalar(name, value)) for name, value in metrics.items()],
            }
            if self._writer is None or not metrics:
                return
            if self._closed:
                append_evals(self.path, rows)
            else:
                self._writer.append("evals", rows)
        except Exception as error:
            self._report("log_eval", error)

    def complete_step(self, **values: float) -> None:
        """Write the last step with what only the training loop knows of it: `epoch`, `tokens`."""
        if self._recorder:
            self._recorder.complete_step(**values)

    def catch_up(self, losses: Sequence[Tensor], scaler: Any) -> None:
        """Take the loss of a backward pass that was over when this tracker was made."""
        if self._recorder:
            self._recorder.catch_up(losses, scaler)

    def end(self, error: BaseException | None = None) -> None:
        """End the run as training ended: complete, interrupted by `error`, or failed with it."""
        self.close(*describe_ending(error))

    def close(self, status: str = "complete", message: str | None = None) -> None:
        """End the run: nothing is watched any more, and its tables become Parquet. Closing twice does nothing."""
        if self._closed or os.getpid() != self._process:  # a forked worker does not end its parent's run
            return
        self._closed = True
        OPEN.discard(self)
        try:
            if self._watch:
                self._watch.close()
            if self._recorder:
                self._recorder.flush()
            self._close_observers()
            if self._writer:
                self._flush_log()
                self._writer.close(status, message)
        except Exception as error:
            self._report("close", error)
        self._tell_cost()
        # A closed tracker that somebody keeps does not keep the optimiser's state.
        self._num_steps, self._recorder, self._watch = self.num_steps, None, None

    def _close_observers(self) -> None:
        for observer in self._observers:
            try:
                observer.close()
            except Exception as error:
                self._report(observer.name, error)
        self._observers = []

    def _tell_cost(self) -> None:
        told = self._recorder.cost.describe() if self._recorder else ""
        if told and not self._quiet:
            print(f"linchain_analysis: {self.num_steps} steps in {self.path}; {told}", file=sys.stderr)

    def _flush_log(self, *, ready_only: bool = False) -> None:
        """Hand logged scalars over once there is a step for them, and those on a device once that step is past."""
        if not self._waiting or not self._writer or (self.num_steps == 0 and not self._closed):
            return
        now: list[tuple[int, str, Any]] = []
        later: list[tuple[int, str, Any]] = []
        for step, name, value in self._waiting:
            still_computing = ready_only and _on_device(value) and step == self.num_steps
            (later if still_computing else now).append((step, name, value))
        self._waiting = later
        if now:
            self._writer.append(
                "scalars",
                {
                    "step": [max(step, 1) for step, _, _ in now],
                    "name": [name for _, name, _ in now],
                    "value": [float(value) for _, _, value in now],
                },
            )

    def _report_chains(self, chains: list[Any], num_found: int) -> None:
        if num_found and not chains:
            logger.warning(
                "tracker: expected include and exclude to leave some of %d modules, got none; only the table `steps` "
                "is recorded. They are regular expressions for names such as those in `model.named_modules()`.",
                num_found,
            )
        elif not chains:
            logger.warning(
                "tracker: expected a model with a trainable PEFT adapter, found none; only the table `steps` is "
                "recorded. Call get_peft_model before the tracker is made, and give it the model that trains."
            )
        refused = {chain.refused: chain.module for chain in chains if chain.refused}
        for reason, module in refused.items():
            logger.warning(
                "tracker: delta of %s (and others alike) is not recorded: %s. Its gradients and updates are.",
                module,
                reason,
            )

    def _fail(self, error: Exception) -> None:
        """End tracking because of a fault of its own."""
        if self._watch:
            self._watch.close()
        if self._writer and not self._closed:
            self._closed = True
            OPEN.discard(self)
            try:
                self._writer.close("failed", f"tracking ended: {error}")
            except Exception as also:
                logger.warning("tracker: the run folder could not be completed either: %s", also)
        if self._strict:
            raise error
        logger.warning(
            "tracker: tracking of %s ended after step %d by a fault of its own (%s: %s). Training goes on untracked; "
            "pass strict=True to see where it came from.",
            self.path,
            self.num_steps,
            type(error).__name__,
            error,
        )

    def _report(self, place: str, error: Exception) -> None:
        if self._strict:
            raise error
        logger.warning("tracker.%s: %s (%s); training goes on.", place, error, type(error).__name__)


def _check(model: object, optimizer: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(
            "model", expected="a torch.nn.Module", got=type(model).__name__, do="pass the model that trains"
        )
    if not isinstance(optimizer, Optimizer):
        raise InputError(
            "optimizer",
            expected="a torch.optim.Optimizer",
            got=type(optimizer).__name__,
            do="pass what steps the model",
        )


def _first_rate(optimizer: Optimizer) -> float | None:
    group = optimizer.param_groups[0]
    rate = group.get("initial_lr", group.get("lr"))
    return None if rate is None else float(rate)


def _checked_scalar(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise InputError(name, expected="one number", got=f"a tensor of shape {tuple(value.shape)}", do="reduce it")
        value = value.detach()
        return value.clone() if _on_device(value) else float(value)
    return float(value)


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"
