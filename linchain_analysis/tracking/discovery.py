"""Find what to track in a script that says nothing: optimisers that step, and the adapters they train."""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from linchain_analysis.tracking.interception import Scout, is_watched, unwrap_optimizer
from linchain_analysis.tracking.trained_models import model_of
from linchain_analysis.tracking.trainers import TrainerEvents

logger = logging.getLogger("linchain_analysis")


class Discovery:
    """Makes a tracker for each optimiser that trains adapters, when its first gradients appear.

    A tracker is closed when its optimiser is freed, as in a script that trains one model after the other.

    Args:
        make_tracker: Called with a model, its optimiser, a number counted from 1, and further arguments of `Tracker`;
            returns the tracker.
    """

    def __init__(self, make_tracker: Callable[[nn.Module, Optimizer, int, Mapping[str, Any]], Any]) -> None:
        self._make_tracker = make_tracker
        self.trackers: list[Any] = []
        self._created: list[weakref.ref[Optimizer]] = []  # not yet looked at
        # Those looked at, and how many parameters they had then: adapters may be added to one later.
        self._known: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._trainers: weakref.WeakKeyDictionary[Any, TrainerEvents] = weakref.WeakKeyDictionary()
        self._alive: dict[Any, weakref.ref[Optimizer]] = {}  # by tracker
        # Trackers to close, whose optimiser was freed, and what is known of the Trainer that had it.
        self._done: list[tuple[Any, TrainerEvents | None]] = []
        self._seen = Seen()
        self._scout = Scout(
            created=self._optimizer_created,
            after_backward=self._after_backward,
            before_step=self._before_step,
            trainer_event=self._trainer_event,
        )

    def close(self) -> None:
        """Look no further."""
        self._scout.close()
        self._alive = {}

    def describe_nothing(self) -> str:
        """Say what was seen instead of an optimiser that trains adapters."""
        return self._seen.describe()

    def _optimizer_created(self, optimizer: Optimizer) -> None:
        self._seen.num_created += 1
        self._close_done()
        self._created.append(weakref.ref(optimizer))

    def _after_backward(self, losses: Sequence[Tensor], scaler: Any) -> None:
        """Look at the optimisers that were made since; the loss of this first backward pass is not lost on them."""
        waiting = []
        for reference in self._created:
            optimizer = reference()
            if optimizer is None:
                continue
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            # Sharded ones do not show gradients that are accumulated without communication.
            if any(p.grad is not None or hasattr(p, "full_tensor") for p in parameters):
                tracker = self._consider(unwrap_optimizer(optimizer))
                if tracker is not None:
                    tracker.catch_up(losses, scaler)
            else:
                waiting.append(reference)
        self._created = waiting

    def _before_step(self, optimizer: Optimizer) -> None:
        """Consider an optimiser that steps with a closure, or came about without being made (unpickled)."""
        inner = unwrap_optimizer(optimizer)
        if inner is optimizer:
            self._seen.num_steps += 1
        self._consider(inner)

    def _trainer_event(self, handler: Any, event: str, args: Any, state: Any, more: Mapping[str, Any]) -> None:
        try:
            events = self._trainers.setdefault(handler, TrainerEvents())
            if event == "on_train_begin":
                optimizer = unwrap_optimizer(handler.optimizer)
                if isinstance(optimizer, Optimizer):
                    events.train_begins(args, state, lambda known: self._track(optimizer, known, events))
            else:
                events.hear(event, state, more)
        except Exception as error:  # the script comes first
            logger.warning("track: %s of a Trainer is not recorded (%s: %s).", event, type(error).__name__, error)

    def _consider(self, optimizer: Optimizer) -> Any:
        if self._known.get(optimizer) == _num_parameters(optimizer):
            return None
        return self._track(optimizer, {}, None)

    def _track(self, optimizer: Optimizer, known: Mapping[str, Any], events: TrainerEvents | None) -> Any:
        self._known[optimizer] = _num_parameters(optimizer)
        try:
            if is_watched(optimizer):  # by a tracker of the script's own, or by one of these
                self._seen.tracks_itself = True
                return None
            if any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
                return None  # it steps another, which is seen by itself, as sharpness-aware minimisation does
            model = model_of(optimizer)
            if model is None:
                return None
            tracker = self._make_tracker(model, optimizer, len(self.trackers) + 1, known)
        except Exception as error:  # the script comes first
            logger.warning("track: an optimiser could not be tracked (%s: %s).", type(error).__name__, error)
            return None
        self.trackers.append(tracker)
        self._alive[tracker] = weakref.ref(optimizer, lambda _: self._optimizer_freed(tracker, events))
        return tracker

    def _optimizer_freed(self, tracker: Any, events: TrainerEvents | None) -> None:
        """Close a tracker at once, so that it keeps nothing of the model alive either."""
        self._alive.pop(tracker, None)
        self._done.append((tracker, events))
        if threading.current_thread() is threading.main_thread():  # garbage is collected in any thread
            self._close_done()

    def _close_done(self) -> None:
        while self._done:
            tracker, events = self._done.pop()
            unfinished = events is not None and events.trains and events.tracker is tracker
            if unfinished:
                tracker.close("interrupted", "the Trainer was freed before its training ended")
            else:
                tracker.close()


class Seen:
    """What was seen of a script that trains no adapter."""

    def __init__(self) -> None:
        self.num_created = 0
        self.num_steps = 0
        self.tracks_itself = False

    def describe(self) -> str:
        """Say it in a sentence."""
        if self.tracks_itself:
            return "the script tracks its training itself; nothing was tracked twice."
        if self.num_steps:
            without = "" if "peft" in sys.modules else " (the script does not import PEFT)"
            got = f"{_count(self.num_steps, 'optimiser step')}, none of an adapter{without}"
        elif self.num_created:
            got = f"{_count(self.num_created, 'optimiser')}, never seen to step"
        else:
            got = "no optimiser"
        return f"expected an optimiser that trains a PEFT adapter, got {got}; nothing was tracked."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _num_parameters(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
