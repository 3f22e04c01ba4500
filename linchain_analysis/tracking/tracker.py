"""The tracker for a raw training loop, and what the other ways in are built on."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from linchain_analysis.errors import InputError
from linchain_analysis.probes import Chain, choose_chains, find_chains, name_method
from linchain_analysis.runs import Manifest, RunWriter, append_evals
from linchain_analysis.tracking.health import Health
from linchain_analysis.tracking.interception import Watch, unwrap_optimizer
from linchain_analysis.tracking.lifetime import (
    describe_ending,
    describe_fault,
    forget_frames,
    keep_open,
    let_go,
    logger,
    writes_here,
)
from linchain_analysis.tracking.logged import LoggedScalars, check_scalar
from linchain_analysis.tracking.measuring import Measuring
from linchain_analysis.tracking.mirrors import Mirror, check_mirrors, open_mirrors
from linchain_analysis.tracking.observers import Observer
from linchain_analysis.tracking.presets import SAMPLE_EVERY, Selection, check_intervals, check_patterns, select
from linchain_analysis.tracking.ranks import PeerError, Ranks
from linchain_analysis.tracking.recorder import Recorder
from linchain_analysis.tracking.resumption import Resume, check_resume, open_run
from linchain_analysis.tracking.rows import module_records
from linchain_analysis.tracking.schedule import LOG_BUDGET_BYTES, Every, Schedule, describe_every, parse_every
from linchain_analysis.tracking.scope import find_training, report_chains, report_training


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
        report_to: Where scalars are mirrored besides: `tensorboard`, `wandb`, `trackio`, or several of them. Each has a
            process of its own, which this one never waits for but at the end, for 30 s at most.
        resume: What becomes of a run that `path` holds already. None: it is gone on with if this is the same training,
            resumed from a checkpoint (the same modules, and the optimiser's state and the weights stand at one of its
            steps); later steps are then superseded. A step: the same, for optimisers that do not count. False: never.
        gradients: `cores`, or `full` to keep the gradients of A and B whole in snapshots.
        extra: Anything else for the manifest, JSON-able.
        num_steps: Length of the run where it is known, for `every="auto"`.
        log_budget_bytes: For `every="auto"`.
        strict: Raise faults of the tracker instead of reporting them.
        quiet: Whether to leave out the lines on standard error that say whether the adapter learns (the table `health`
            has them anyway) and, at the end, what tracking cost.
        deferred: Whether the rows of a step wait until `complete_step` says what only the training loop knows.

    Attributes:
        path: Where the run is written.
        fault: What ended tracking before the training ended, None where nothing did.

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
        self._logged = LoggedScalars()
        self._observers: list[Observer] = []
        self._mirrors: list[Mirror] = []
        self.fault: Exception | None = None
        self._closed = False
        self._num_steps = 0
        self._process, self._thread = os.getpid(), threading.get_ident()
        chosen = select(preset, measures)
        shared = chosen.snapshots and snapshot_every is None  # then snapshots take half of the budget
        schedule = parse_every(every, num_steps, log_budget_bytes // 2 if shared else log_budget_bytes)
        check_intervals(sample_every, snapshot_every, gradients)
        check_patterns(include, exclude)
        check_resume(resume)
        mirrors = check_mirrors(report_to)
        inner = unwrap_optimizer(optimizer)
        _check(model, inner)
        ranks: Ranks | None = None
        try:
            all_chains = choose_chains(found := find_chains(model, inner), include, exclude)
            chains, flat, ranks = find_training(all_chains, model, inner, chosen.name)
            if not writes_here():
                if ranks:
                    self._assist(model, inner, chains, chosen, schedule, ranks)
                return
            if not flat:
                report_chains(model, chains, len(found))
            report_training(flat, ranks, chosen)
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
            schedule.go_on(opened.history.recorded, opened.history.num_bytes)
            measuring.go_on(opened.history.recorded, opened.history.snapshot_sizes)
            self._observers = [Health(chains, model, inner, self._write_health, self._say)]
            self._mirrors = open_mirrors(mirrors, chains, manifest, self.path, after=opened.num_steps)
            self._recorder = Recorder(
                inner,
                chains,
                self._writer,
                measuring,
                schedule,
                deferred=deferred,
                fail=self._fail,
                observers=[*self._observers, *self._mirrors],
                num_steps=opened.num_steps,
                start=opened.start,
                ranks=ranks,
                model=model,
                knows_gradients=not flat,
            )
            self._recorder.go_on_averaging(opened.history.noise)
            self._follow(self._recorder)
            keep_open(self)
        except Exception as error:
            if ranks:
                ranks.refuse()
            self._fail(error)

    def _assist(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        chains: Sequence[Chain],
        chosen: Selection,
        schedule: Schedule,
        ranks: Ranks,
    ) -> None:
        """Follow the training of a process that writes nothing, for the one that does."""
        measuring = Measuring(chosen, chains)
        self._recorder = Recorder(
            optimizer, chains, None, measuring, schedule, deferred=False, fail=self._fail, ranks=ranks, model=model
        )
        self._follow(self._recorder)

    def _follow(self, recorder: Recorder) -> None:
        self._watch = Watch(recorder)
        recorder.unwatch = self._watch.close

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

    @property
    def writes(self) -> bool:
        """Whether the run is written by this process: of several that train together, the first does."""
        return writes_here()

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
                checked = check_scalar(name, value)
                if self._writer:
                    self._logged.add(self.num_steps, name, checked)
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
                "value": [float(check_scalar(name, value)) for name, value in metrics.items()],
            }
            if self._writer is None or not metrics:
                return
            if self._closed:
                append_evals(self.path, rows)
            else:
                self._writer.append("evals", rows)
                for name, value in zip(metrics, rows["value"], strict=True):
                    self._mirror(self.num_steps, {f"evals/{split}/{name}": value})
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
        if os.getpid() != self._process:  # a forked worker does not end its parent's run
            return
        if self._closed:
            self._release()  # what stayed to tell other processes of a fault
            return
        if self._watch:
            self._watch.close()
        if self._recorder:
            self._recorder.flush()
        if self.fault is not None:  # what still waited could not be written, which has been told
            return
        self._closed = True
        try:
            if self._writer:
                self._flush_log()
            self._close_each(self._observers)
            if self._writer:
                self._writer.close(status, message)
            self._close_each(self._mirrors)  # last, for they may take their time
        except Exception as error:
            self._report("close", error)
        finally:
            let_go(self)
        self._tell_cost()
        self._release()

    def interrupt(self, signal_name: str, *, write_rows: bool) -> None:
        """Write down that a signal ends the process; nothing else is closed, for that could take long.

        Args:
            signal_name: Such as SIGTERM.
            write_rows: Whether rows that wait may be written: the main thread asks, and is in nothing of the tracker's.
        """
        if os.getpid() != self._process or self._writer is None:
            return
        self._writer.mark("interrupted", signal_name)
        if write_rows and self._recorder and not self._closed and threading.get_ident() == self._thread:
            self._closed = True  # a fault in what follows is nobody's concern any more
            self._recorder.flush()

    def _release(self) -> None:
        """A closed tracker that somebody keeps does not keep the optimiser's state."""
        self._observers, self._mirrors = [], []
        if self._watch:
            self._watch.close()
        if self._recorder:
            self._recorder.part()
        self._num_steps, self._recorder, self._watch = self.num_steps, None, None

    def _close_each(self, observers: Sequence[Observer]) -> None:
        for observer in observers:
            try:
                observer.close()
            except Exception as error:
                self._report(observer.name, error)

    def _tell_cost(self) -> None:
        told = self._recorder.cost.describe() if self._recorder else ""
        if told:
            self._say(f"{self.num_steps} steps in {self.path}; {told}")

    def _say(self, message: str) -> None:
        if not self._quiet:
            print(f"linchain_analysis: {message}", file=sys.stderr)

    def _write_health(self, columns: Mapping[str, Sequence[Any]]) -> None:
        if self._writer:
            self._writer.append("health", columns)

    def _flush_log(self, *, ready_only: bool = False) -> None:
        """Write logged scalars that belong to a step by now."""
        if not self._writer or (self.num_steps == 0 and not self._closed):
            return
        said = self._logged.take(self.num_steps if ready_only else None)
        if not said:
            return
        steps, names, values = zip(*said, strict=True)
        self._writer.append("scalars", {"step": steps, "name": names, "value": values})
        for step, name, value in said:
            self._mirror(step, {f"steps/{name}": value})

    def _mirror(self, step: int, values: Mapping[str, float]) -> None:
        for mirror in self._mirrors:
            try:
                mirror.log(step, values)
            except Exception as error:
                self._report(mirror.name, error)

    def _fail(self, error: Exception) -> None:
        """End tracking because of a fault of its own, or of the disk."""
        if self._closed:  # another thread went on training while this one closed the run
            return
        self._closed, self.fault = True, error
        lingers = self._recorder is not None and self._recorder.lingers
        if self._watch and not lingers:
            self._watch.close()
        if self._writer:
            with contextlib.suppress(Exception):  # where rows cannot be written, as like as not neither can this
                self._writer.close("failed", f"tracking ended: {error}")
            self._writer = None  # what is logged from now on goes nowhere, without a word each time
        self._close_each([*self._observers, *self._mirrors])
        let_go(self)
        num_steps = self.num_steps
        if not lingers:
            self._release()
        told_elsewhere = isinstance(error, PeerError) and not writes_here()  # where it happened and where rows are
        if self._strict and not told_elsewhere:
            raise error
        if not told_elsewhere:
            logger.warning(describe_fault(error, self.path, num_steps))
        forget_frames(error)

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
