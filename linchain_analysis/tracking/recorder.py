"""From what the hooks tell to the rows of a run: one recorder follows one optimiser."""

from __future__ import annotations

import functools
import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from linchain_analysis.probes import Chain, ChainReader, Reading, Start
from linchain_analysis.runs import RunWriter, save_start
from linchain_analysis.tracking.cost import Cost
from linchain_analysis.tracking.gradients import norm_of_gradients, square_of_shards
from linchain_analysis.tracking.interception import scale_left_in
from linchain_analysis.tracking.joint import JointTraining, local_scalar
from linchain_analysis.tracking.lifetime import forget_frames
from linchain_analysis.tracking.measuring import Measuring
from linchain_analysis.tracking.noise import NoiseScale
from linchain_analysis.tracking.observers import FinishedStep, Observer
from linchain_analysis.tracking.parameters import WatchedParameters, learning_rates, optimized_rows
from linchain_analysis.tracking.ranks import Ranks
from linchain_analysis.tracking.rows import RowMaker
from linchain_analysis.tracking.schedule import Schedule

logger = logging.getLogger("linchain_analysis")

P = ParamSpec("P")
_NAN = float("nan")


def _guarded(method: Callable[P, None]) -> Callable[P, None]:
    """Count the recorder's own seconds, keep its exceptions from the training, and silence it once it failed."""

    @functools.wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        self = args[0]
        assert isinstance(self, Recorder)
        if self.failed:
            self._see_off(method.__name__)
            return
        self._entered = time.perf_counter()
        try:
            method(*args, **kwargs)
        except Exception as error:
            self.failed = True
            self._reader.tokens.disarm()  # nobody will take its hooks away later
            self._fail(error)  # raises it again where the user asked for that
        finally:
            self._own_seconds += time.perf_counter() - self._entered

    return guarded


@dataclass
class _Clipping:
    """What clipping did to the gradients of this step."""

    coef: Tensor | None  # None: clipped by value
    parameters: set[int]


class Recorder:
    """Listens to one optimiser and writes each of its steps.

    Args:
        optimizer: The optimiser that is followed (unwrapped).
        chains: What it trains, among the adapted layers.
        writer: Where rows go; None in the processes that write nothing, and only tell the one that does.
        measuring: What is recorded.
        schedule: Which steps are recorded whole; every step has its row in `steps`.
        deferred: Whether a step's rows wait for `complete_step`, from somebody who knows the epoch.
        fail: Told of any exception in here; afterwards nothing is recorded.
        observers: Told of each step as it ends.
        num_steps: How many steps the run has already, of a training that goes on from a checkpoint.
        start: Where that training began.
        ranks: The processes that train together; None where this one is by itself.
        model: What trains.
        knows_gradients: Whether the norm of all gradients can be told from what this process has.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        chains: Sequence[Chain],
        writer: RunWriter | None,
        measuring: Measuring,
        schedule: Schedule,
        *,
        deferred: bool,
        fail: Callable[[Exception], None],
        observers: Sequence[Observer] = (),
        num_steps: int = 0,
        start: Start | None = None,
        ranks: Ranks | None = None,
        model: nn.Module | None = None,
        knows_gradients: bool = True,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)  # a script that is done with it may free it
        self.writer = writer
        self.num_steps = num_steps
        self.cost = Cost()
        self._chains = list(chains)
        self._measuring = measuring
        self._wanted = measuring.wanted
        self._group_counts: list[int] = []
        self._optimized: tuple[NDArray[np.bool_], set[int]] = np.zeros(0, dtype=bool), set()
        self._joint = JointTraining(ranks, chains, optimizer) if ranks else None
        self._in_parts = self._joint.factors if self._joint else None
        # Without a strong reference to itself, so that a closed tracker frees the optimiser at once.
        own = weakref.proxy(self)
        self._reader = ChainReader(
            self._in_parts.chains if self._in_parts else chains if writer else (),
            self._wanted,
            lambda parameter: own._trains(parameter),
        )
        self._rows = RowMaker(chains, writer.numbers["factor"]) if writer else None
        self._schedule = schedule
        self._deferred = deferred
        self._fail = fail
        self.failed = False
        self._entered = 0.0
        self._started = False
        self._known_start = start
        self._observers = list(observers)
        self._watched = WatchedParameters(chains, model if self._in_parts else None)
        self._watched.look_up(optimizer)
        self._losses: list[Tensor] = []
        self._scaler: Any = None
        self._clipping: _Clipping | None = None
        self._read = False  # the gradients of this step have been read
        self._recording = False
        self._stepping = False
        self._in_closure = False
        self._decided, self._decision = 0, False
        self._grad_norm: Tensor | None = None
        self._knows_gradients = knows_gradients
        self._learning_rate: Any = None
        self._own_seconds = 0.0
        self._last_end = time.perf_counter()
        self._pending: dict[str, dict[str, Any]] = {}
        self._num_joined = 0
        self._rates: dict[int, float] = {}
        self._noise = NoiseScale() if measuring.selection.noise else None
        self.unwatch: Callable[[], None] = lambda: None  # how to be told of nothing any more
        self._look_ahead()

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser that is followed; nothing is told of one that is gone."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    # --- what the hooks tell -----------------------------------------------------------------------------------

    @_guarded
    def begin_backward(self) -> None:
        """Note the state of the gradients, to see whether this backward pass is about them."""
        if self._stepping and not self._in_closure:
            self._forget()  # the step that had begun was left by an exception
        self._begin()  # before any optimiser steps, of those that train this model together
        self._watched.look_up(self.optimizer)
        self._reader.tokens.begin_backward()
        if self._losses and not self._stepping and self._watched.have_no_gradient:
            self._forget()  # somebody discarded a batch
        self._watched.note_gradients()

    @_guarded
    def end_backward(self, losses: Sequence[Tensor], scaler: Any) -> None:
        """Take the loss, if the backward pass reached a parameter of this optimiser."""
        if self._watched.have_changed:
            self._take(losses, scaler)
            if self._noise is not None and not self._stepping and not self._joint:
                self._noise.add_pass(self.optimizer, scale_left_in(scaler, self.optimizer))

    @_guarded
    def catch_up(self, losses: Sequence[Tensor], scaler: Any) -> None:
        """Take the loss of a backward pass that was over before anybody listened."""
        if not (self._in_parts and self._watched.have_no_gradient):
            self._take(losses, scaler)

    @_guarded
    def before_clip(self, parameters: Sequence[Tensor], coef: Tensor | None) -> None:
        """Read the gradients while they are whole."""
        if self._stepping:  # a later evaluation of a closure
            return
        clipped = {id(parameter) for parameter in parameters}
        if not self._watched.include_any(clipped):
            return
        if not self._read:
            self._read_gradients(scale_left_in(self._scaler, self.optimizer))
        self._clipping = _combine(self._clipping, coef, clipped)

    @_guarded
    def before_step(self, scale: Tensor | None, *, in_closure: bool) -> None:
        """Read the gradients if nobody clipped them, and copy the factors."""
        if self._stepping:  # the step before was left by an exception, and no backward pass came since
            self._read = False
        self._prepare(scale)
        self._stepping, self._in_closure = True, in_closure

    @_guarded
    def abandon_step(self) -> None:
        """Forget a step that was left by an exception."""
        self._forget()

    @_guarded
    def after_step(self, found_inf: Tensor | None) -> None:
        """Read the factors and write the step."""
        self._finish(found_inf)

    @_guarded
    def step_left_out(self) -> None:
        """Record a step that the gradient scaler did not let happen."""
        self._prepare(None)
        self._finish(torch.ones(()))

    # --- what the tracker asks ---------------------------------------------------------------------------------

    @_guarded
    def complete_step(self, **values: float) -> None:
        """Fill in what only the training loop knows of the last step, and write its rows."""
        if self._pending:
            steps = self._pending["steps"]
            steps.update({name: [value] for name, value in values.items()})
            self._write()

    @_guarded
    def go_on_averaging(self, noise: NDArray[np.float64]) -> None:
        """Take the estimates of the gradient noise from the steps of a run that goes on."""
        if self._noise is not None:
            self._noise.go_on(noise)

    @_guarded
    def flush(self) -> None:
        """Write the rows that still wait, and look at nothing any more."""
        self._write()
        self._reader.tokens.disarm()

    # --- inside ------------------------------------------------------------------------------------------------

    def _take(self, losses: Sequence[Tensor], scaler: Any) -> None:
        if self._stepping:  # LBFGS evaluates its closure again; the step's loss and gradient are the first
            return
        self._losses += losses
        self._scaler = scaler
        # What was read at an earlier clipping is not the whole gradient any more.
        self._read, self._clipping = False, None

    def _forget(self) -> None:
        """Begin the step anew."""
        self._losses, self._scaler, self._clipping = [], None, None
        if self._noise is not None:
            self._noise.forget()
        self._read = self._recording = self._stepping = False

    def _prepare(self, scale: Tensor | None) -> None:
        """Read all that has to be read before the factors change."""
        if not self._read:
            self._read_gradients(scale)
        self._learning_rate = self.optimizer.param_groups[0].get("lr")
        if self._wanted.squares:
            self._rates = learning_rates(self.optimizer, self._rates)
        if self._recording and self._in_parts:
            self._in_parts.take_factors("before")
        elif self._recording:
            self._reader.read_before()

    def _begin(self) -> None:
        """Before the very first step: remember where training begins."""
        if self._started:
            return
        self._started = True
        if self._in_parts:
            self._in_parts.take_factors("start")  # to be read with the first step
        elif self.writer:
            self._save_start(self._reader.keep_start(self._known_start))

    def _save_start(self, start: Start | None) -> None:
        if self.writer and start and self._known_start is None:
            save_start(self.writer.path, start.factors, start.squares)
        self._known_start = None

    def _read_gradients(self, scale: Tensor | None) -> None:
        self._write()  # of the step before, if nobody completed it
        self._read = True
        self._begin()
        self._recording = self._records(self.num_steps + 1)
        if self._in_parts:
            self._grad_norm = square_of_shards(self.optimizer, scale)
            if self._recording:
                self._in_parts.take_gradients(scale)
            return
        if not self.writer:
            return
        if self._recording:
            self._reader.read_gradients(scale)
            optimized, ids = self._find_optimized()
            known = self._reader.gradient_square(optimized) if optimized.any() else []
            self._grad_norm = norm_of_gradients(self.optimizer, scale, known, ids)
        else:
            self._grad_norm = norm_of_gradients(self.optimizer, scale)
        if self._reader.tokens.armed:
            self._reader.tokens.collect(_loss_scale(self._scaler))
            self._reader.tokens.disarm()
            fault = self._reader.tokens.fault
            if fault is not None and self._measuring.strict:
                raise fault
            if fault is not None:
                forget_frames(fault)

    def _trains(self, parameter: nn.Parameter) -> bool:
        """Whether a factor takes part in training: it has gradients and the optimiser knows it."""
        if self._joint:
            parameter = self._joint.original(parameter)
        return parameter.requires_grad and id(parameter) in self._find_optimized()[1]

    def _find_optimized(self) -> tuple[NDArray[np.bool_], set[int]]:
        """Which factors the optimiser trains; looked up anew when its groups change."""
        counts = [len(group["params"]) for group in self.optimizer.param_groups]
        if counts != self._group_counts:
            self._group_counts, self._optimized = counts, optimized_rows(self.optimizer, self._chains)
        return self._optimized

    def _records(self, step: int) -> bool:
        if self.writer is None:  # the process that writes decides, when the step is over
            return self._in_parts is not None
        if self._decided != step:  # a schedule is asked once for each step
            self._decided, self._decision = step, self._schedule.wants(step, self.writer.bytes_written)
        return self._decision

    def _look_ahead(self) -> None:
        """Prepare for what has to be seen before the next step is there: the tokens of its backward pass."""
        step = self.num_steps + 1
        if not self._joint and self._measuring.looks_at_tokens(step) and self._records(step):
            self._reader.tokens.arm()

    def _finish(self, found_inf: Tensor | None) -> None:
        self.num_steps += 1
        try:
            reading, values = self._read_step(found_inf)
        except Exception:
            if self._joint:
                self._joint.leave()
            raise
        grad_norm, learning_rate, clip_coef, inf, first_norm, *losses = values
        loss = sum(losses) if losses else _NAN
        if self._joint:
            joined = self._joint.join(recorded=self._recording, losses=losses, grad_norm=grad_norm, found_inf=inf)
            loss, grad_norm, inf = joined.loss, joined.grad_norm, joined.found_inf
            if self._joint.in_parts:
                reading = self._read_parts(recorded=joined.recorded)
            elif self._joint.ranks.alone:
                self._joint = None
        now = time.perf_counter()
        row: dict[str, list[Any]] = {
            "step": [self.num_steps],
            "loss": [loss],
            "learning_rate": [learning_rate],
            "grad_norm": [grad_norm],
            "clip_coef": [clip_coef],
            "skipped": [inf != 0],
            "seconds": [now - self._last_end],
        }
        self._last_end = now
        if self.writer:
            self._make_rows(row, reading, first_norm)
        self._forget()
        self._look_ahead()
        if self.writer:
            if not self._deferred:
                self._write()
            self._tell_observers(row, reading)

    def _read_step(self, found_inf: Tensor | None) -> tuple[Reading | None, list[float]]:
        """Read what this process has of the step, and bring it to the host at once."""
        clipping = self._clipping
        by_value = clipping is not None and clipping.coef is None
        extra = [
            local_scalar(self._grad_norm if self._knows_gradients else None),
            local_scalar(self._learning_rate),
            local_scalar(_NAN if by_value else 1.0 if clipping is None else clipping.coef),
            local_scalar(0.0 if found_inf is None else found_inf),
            local_scalar(None if self._noise is None else self._noise.first_norm),
            *(local_scalar(loss) for loss in self._losses),
        ]
        if self._recording and not self._in_parts:
            return self._reader.read_after(extra, self._rates)
        return None, self._reader.bring_home(extra)

    def _read_parts(self, *, recorded: bool) -> Reading | None:
        """Read factors that several processes hold together."""
        assert self._joint is not None and self._in_parts is not None
        reader = self._reader if self.writer else None
        if self._num_joined == 0:
            self._save_start(self._joint.keep_start(reader, self._known_start, base=self._wanted.base))
        self._num_joined += 1
        if not recorded:
            return None
        readings: list[Reading] = []
        rates = self._joint.of_wholes(self._rates)
        self._joint.read(reader, lambda of: readings.append(of.read_after((), rates)[0]), self._in_parts.divisor)
        return readings[0] if readings else None

    def _make_rows(self, row: dict[str, list[Any]], reading: Reading | None, first_norm: float) -> None:
        """Prepare the rows of a step to be written."""
        assert self._rows is not None
        if reading is not None and self._chains:
            measured = self._measuring.rows(self.num_steps, reading)
            self._pending["modules"] = self._rows.module_rows(self.num_steps, reading) | measured["modules"]
            self._pending["factors"] = self._rows.factor_rows(self.num_steps, reading) | measured["factors"]
            self._pending["links"] = measured["links"]
            self._pending["snapshots"] = self._measuring.snapshot(self.num_steps, reading) or {}
            self._reader.tokens.forget()
        self._pending["steps"] = dict(row)
        if self._noise is not None:
            self._pending["steps"] |= self._noise.columns(first_norm, row["grad_norm"][0])

    # --- among several processes -------------------------------------------------------------------------------

    @property
    def lingers(self) -> bool:
        """Whether others still have to be told that tracking has ended here, so that hooks have to stay."""
        return self.failed and self._joint is not None and not (self._joint.ranks.alone or self._joint.ranks.left)

    def _see_off(self, hook: str) -> None:
        """After a fault: tell the others when their step ends too, and then be told of nothing any more."""
        if self.lingers and hook in ("after_step", "step_left_out"):
            assert self._joint is not None
            self._joint.leave()
        elif hook == "begin_backward" and not self.lingers:  # not while an optimiser goes through its hooks
            self.unwatch()

    def part(self) -> None:
        """Be gone for the other processes; waits for nobody."""
        if self._joint:
            self._joint.ranks.close()

    def _tell_observers(self, row: Mapping[str, Sequence[Any]], reading: Reading | None) -> None:
        values = {name: float(column[0]) for name, column in row.items() if name != "step"}
        finished = FinishedStep(self.num_steps, values, reading)
        for observer in list(self._observers):
            try:
                observer.see(finished)
            except Exception as error:  # tracking goes on without it
                if self._measuring.strict:
                    raise
                self._observers.remove(observer)
                logger.warning(
                    "tracker: %s is left out from step %d on (%s: %s).",
                    observer.name,
                    self.num_steps,
                    type(error).__name__,
                    error,
                )

    def _write(self) -> None:
        """Write what is pending, the row of `steps` last: it is what makes the others valid."""
        if not self._pending or not self.writer:
            return
        pending, self._pending = self._pending, {}
        # The seconds of this very writing are counted with the next step.
        so_far = time.perf_counter() - self._entered
        own = self._own_seconds + so_far
        pending["steps"]["track_seconds"] = [own]
        self.cost.add(pending["steps"]["seconds"][0], own)
        self._own_seconds = -so_far
        for table in ("modules", "factors", "links", "snapshots", "steps"):
            if pending.get(table):
                self.writer.append(table, pending[table])


def _loss_scale(scaler: Any) -> float:
    """What the gradients of a backward pass hold of a gradient scaler."""
    scale = getattr(scaler, "_scale", None)
    return 1.0 if scale is None else float(scale)


def _combine(clipping: _Clipping | None, coef: Tensor | None, parameters: set[int]) -> _Clipping:
    """Join clippings of one step: of the same parameters they multiply, of others the stronger one stands."""
    if clipping is None:
        return _Clipping(coef, parameters)
    if clipping.coef is None or coef is None:
        return _Clipping(None, clipping.parameters | parameters)
    both = clipping.coef * coef if clipping.parameters & parameters else torch.minimum(clipping.coef, coef)
    return _Clipping(both, clipping.parameters | parameters)
