"""From what the hooks tell to the rows of a run: one recorder follows one optimiser."""

from __future__ import annotations

import functools
import logging
import time
import weakref
from collections.abc import Callable, Sequence
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
from linchain_analysis.tracking.gradients import norm_of_gradients
from linchain_analysis.tracking.interception import scale_left_in
from linchain_analysis.tracking.measuring import Measuring
from linchain_analysis.tracking.noise import NoiseScale
from linchain_analysis.tracking.observers import FinishedStep, Observer
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
        writer: Where rows go.
        measuring: What is recorded.
        schedule: Which steps are recorded whole; every step has its row in `steps`.
        deferred: Whether a step's rows wait for `complete_step`, from somebody who knows the epoch.
        fail: Told of any exception in here; afterwards nothing is recorded.
        observers: Told of each step as it ends.
        num_steps: How many steps the run has already, of a training that goes on from a checkpoint.
        start: Where that training began.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        chains: Sequence[Chain],
        writer: RunWriter,
        measuring: Measuring,
        schedule: Schedule,
        *,
        deferred: bool,
        fail: Callable[[Exception], None],
        observers: Sequence[Observer] = (),
        num_steps: int = 0,
        start: Start | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.writer = writer
        self.num_steps = num_steps
        self.cost = Cost()
        self._chains = list(chains)
        self._measuring = measuring
        self._wanted = measuring.wanted
        self._group_counts: list[int] = []
        self._optimized: tuple[NDArray[np.bool_], set[int]] = np.zeros(0, dtype=bool), set()
        # Without a strong reference to itself, so that a closed tracker frees the optimiser at once.
        own = weakref.proxy(self)
        self._reader = ChainReader(chains, self._wanted, lambda parameter: own._trains(parameter))
        self._rows = RowMaker(chains, writer.numbers["factor"])
        self._schedule = schedule
        self._deferred = deferred
        self._fail = fail
        self.failed = False
        self._entered = 0.0
        self._started = False
        self._known_start = start
        self._observers = list(observers)
        self._watched = _watched_parameters(optimizer, chains)
        self._versions: list[tuple[int, int]] = []
        self._losses: list[Tensor] = []
        self._scaler: Any = None
        self._clipping: _Clipping | None = None
        self._read = False  # the gradients of this step have been read
        self._recording = False
        self._stepping = False
        self._in_closure = False
        self._decided, self._decision = 0, False
        self._grad_norm: Tensor | None = None
        self._learning_rate: Any = None
        self._own_seconds = 0.0
        self._last_end = time.perf_counter()
        self._pending: dict[str, dict[str, Any]] = {}
        self._last_row: dict[str, list[Any]] = {}
        self._rates: dict[int, float] = {}
        self._noise = NoiseScale() if measuring.selection.noise else None
        self._look_ahead()

    # --- what the hooks tell -----------------------------------------------------------------------------------

    @_guarded
    def begin_backward(self) -> None:
        """Note the state of the gradients, to see whether this backward pass is about them."""
        if self._stepping and not self._in_closure:
            self._forget()  # the step that had begun was left by an exception
        self._begin()  # before any optimiser steps, of those that train this model together
        self._watched = _watched_parameters(self.optimizer, self._chains)
        self._reader.tokens.begin_backward()
        if self._losses and not self._stepping and all(parameter.grad is None for parameter in self._watched):
            self._forget()  # somebody discarded a batch
        self._versions = [_version(parameter) for parameter in self._watched]

    @_guarded
    def end_backward(self, losses: Sequence[Tensor], scaler: Any) -> None:
        """Take the loss, if the backward pass reached a parameter of this optimiser."""
        reached = any(
            _version(parameter) != before for parameter, before in zip(self._watched, self._versions, strict=True)
        )
        if reached:
            self._take(losses, scaler)
            if self._noise is not None and not self._stepping:
                self._noise.add_pass(self.optimizer, scale_left_in(scaler, self.optimizer))

    @_guarded
    def catch_up(self, losses: Sequence[Tensor], scaler: Any) -> None:
        """Take the loss of a backward pass that was over before anybody listened."""
        self._take(losses, scaler)

    @_guarded
    def before_clip(self, parameters: Sequence[Tensor], coef: Tensor | None) -> None:
        """Read the gradients while they are whole."""
        if self._stepping:  # a later evaluation of a closure
            return
        clipped = {id(parameter) for parameter in parameters}
        if not any(id(parameter) in clipped for parameter in self._watched):
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
            self._rates = _learning_rates(self.optimizer, self._rates)
        if self._recording:
            self._reader.read_before()

    def _begin(self) -> None:
        """Before the very first step: remember where training begins."""
        if self._started:
            return
        self._started = True
        start = self._reader.keep_start(self._known_start)
        if self._known_start is None:
            save_start(self.writer.path, start.factors, start.squares)
        self._known_start = None

    def _read_gradients(self, scale: Tensor | None) -> None:
        self._write()  # of the step before, if nobody completed it
        self._read = True
        self._begin()
        self._recording = self._records(self.num_steps + 1)
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

    def _trains(self, parameter: nn.Parameter) -> bool:
        """Whether a factor takes part in training: it has gradients and the optimiser knows it."""
        return parameter.requires_grad and id(parameter) in self._find_optimized()[1]

    def _find_optimized(self) -> tuple[NDArray[np.bool_], set[int]]:
        """Which factors the optimiser trains; looked up anew when its groups change."""
        counts = [len(group["params"]) for group in self.optimizer.param_groups]
        if counts != self._group_counts:
            self._group_counts, self._optimized = counts, _optimized_rows(self.optimizer, self._chains)
        return self._optimized

    def _records(self, step: int) -> bool:
        if self._decided != step:  # a schedule is asked once for each step
            self._decided, self._decision = step, self._schedule.wants(step, self.writer.bytes_written)
        return self._decision

    def _look_ahead(self) -> None:
        """Prepare for what has to be seen before the next step is there: the tokens of its backward pass."""
        step = self.num_steps + 1
        if self._measuring.looks_at_tokens(step) and self._records(step):
            self._reader.tokens.arm()

    def _finish(self, found_inf: Tensor | None) -> None:
        self.num_steps += 1
        clipping = self._clipping
        by_value = clipping is not None and clipping.coef is None
        extra = [
            _scalar(self._grad_norm),
            _scalar(self._learning_rate),
            _scalar(_NAN if by_value else 1.0 if clipping is None else clipping.coef),
            _scalar(0.0 if found_inf is None else found_inf),
            _scalar(None if self._noise is None else self._noise.first_norm),
            *(_scalar(loss) for loss in self._losses),
        ]
        reading: Reading | None = None
        if self._recording:
            reading, values = self._reader.read_after(extra, self._rates)
        else:
            values = self._reader.bring_home(extra)
        grad_norm, learning_rate, clip_coef, inf, first_norm, *losses = values
        now = time.perf_counter()
        if reading is not None and self._chains:
            measured = self._measuring.rows(self.num_steps, reading)
            self._pending["modules"] = self._rows.module_rows(self.num_steps, reading) | measured["modules"]
            self._pending["factors"] = self._rows.factor_rows(self.num_steps, reading) | measured["factors"]
            self._pending["links"] = measured["links"]
            self._pending["snapshots"] = self._measuring.snapshot(self.num_steps, reading) or {}
            self._reader.tokens.forget()
        self._pending["steps"] = {
            "step": [self.num_steps],
            "loss": [sum(losses) if losses else _NAN],
            "learning_rate": [learning_rate],
            "grad_norm": [grad_norm],
            "clip_coef": [clip_coef],
            "skipped": [inf != 0],
            "seconds": [now - self._last_end],
        }
        self._last_row = dict(self._pending["steps"])
        if self._noise is not None:
            self._pending["steps"] |= self._noise.columns(first_norm, grad_norm)
        self._last_end = now
        self._forget()
        self._look_ahead()
        if not self._deferred:
            self._write()
        self._tell_observers(reading)

    def _tell_observers(self, reading: Reading | None) -> None:
        values = {name: float(column[0]) for name, column in self._last_row.items() if name != "step"}
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
        if not self._pending:
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


def _watched_parameters(optimizer: Optimizer, chains: Sequence[Chain]) -> list[nn.Parameter]:
    """Parameters by which a backward pass or a clipping is recognised as this optimiser's, each once."""
    optimized = (parameter for group in optimizer.param_groups for parameter in group["params"])
    factors = (factor.parameter for chain in chains for factor in chain.factors)
    return list({id(parameter): parameter for parameter in (*optimized, *factors)}.values())


def _optimized_rows(optimizer: Optimizer, chains: Sequence[Chain]) -> tuple[NDArray[np.bool_], set[int]]:
    """Which rows of `factors` are parameters of the optimiser, each counted once, and their identities."""
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    ids: set[int] = set()
    rows = []
    for chain in chains:
        for factor in chain.factors:
            number = id(factor.parameter)
            rows.append(number in optimized and number not in ids)
            if rows[-1]:
                ids.add(number)
    return np.array(rows, dtype=bool), ids


def _learning_rates(optimizer: Optimizer, last: dict[int, float]) -> dict[int, float]:
    """Learning rate by the identity of the parameter: where a schedule has it at 0, the one before or the group's own.

    What is asked of them is their ratio between factors, which a warm-up from 0 does not change.
    """
    rates = {}
    for group in optimizer.param_groups:
        rate = float(group.get("lr", _NAN)) or float(group.get("initial_lr", 0.0))
        rates.update({id(parameter): rate or last.get(id(parameter), 0.0) for parameter in group["params"]})
    return rates


def _loss_scale(scaler: Any) -> float:
    """What the gradients of a backward pass hold of a gradient scaler."""
    scale = getattr(scaler, "_scale", None)
    return 1.0 if scale is None else float(scale)


def _version(parameter: nn.Parameter) -> tuple[int, int]:
    grad = parameter.grad
    return (0, 0) if grad is None else (id(grad), grad._version)


def _combine(clipping: _Clipping | None, coef: Tensor | None, parameters: set[int]) -> _Clipping:
    """Join clippings of one step: of the same parameters they multiply, of others the stronger one stands."""
    if clipping is None:
        return _Clipping(coef, parameters)
    if clipping.coef is None or coef is None:
        return _Clipping(None, clipping.parameters | parameters)
    both = clipping.coef * coef if clipping.parameters & parameters else torch.minimum(clipping.coef, coef)
    return _Clipping(both, clipping.parameters | parameters)


def _scalar(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().reshape(-1)[:1].reshape(()).double()
    return torch.tensor(_NAN if value is None else float(value), dtype=torch.float64)
