"""Find what to track in a script that says nothing: optimisers that step, and the adapters they train."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from linchain_analysis.tracking.interception import Scout, unwrap_optimizer

logger = logging.getLogger("linchain_analysis")


class Discovery:
    """Makes a tracker for each optimiser that trains adapters, when its first gradients appear.

    Args:
        make_tracker: Called with a model, its optimiser and a number counted from 1; returns the tracker.
    """

    def __init__(self, make_tracker: Callable[[nn.Module, Optimizer, int], Any]) -> None:
        self._make_tracker = make_tracker
        self.trackers: list[Any] = []
        self._created: list[weakref.ref[Optimizer]] = []  # not yet looked at
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._scout = Scout(
            created=lambda optimizer: self._created.append(weakref.ref(optimizer)),
            after_backward=self._after_backward,
            before_step=self._before_step,
        )

    def close(self) -> None:
        """Look no further."""
        self._scout.close()

    def _after_backward(self, losses: Sequence[Tensor], scaler: Any) -> None:
        """Look at the optimisers that were made since; the loss of this first backward pass is not lost on them."""
        waiting = []
        for reference in self._created:
            optimizer = reference()
            if optimizer is None:
                continue
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                tracker = self._consider(unwrap_optimizer(optimizer))
                if tracker is not None:
                    tracker.catch_up(losses, scaler)
            else:
                waiting.append(reference)
        self._created = waiting

    def _before_step(self, optimizer: Optimizer) -> None:
        """Consider an optimiser that steps with a closure or came about without being made (unpickled)."""
        self._consider(unwrap_optimizer(optimizer))

    def _consider(self, optimizer: Optimizer) -> Any:
        if optimizer in self._known:
            return None
        self._known.add(optimizer)
        try:
            model = _model_of(optimizer)
            if model is None:
                return None
            tracker = self._make_tracker(model, optimizer, len(self.trackers) + 1)
        except Exception as error:  # the script comes first
            logger.warning("track: an optimiser could not be tracked (%s: %s).", type(error).__name__, error)
            return None
        self.trackers.append(tracker)
        return tracker


def _model_of(optimizer: Optimizer) -> nn.Module | None:
    """Return the outermost module that holds adapted layers whose parameters `optimizer` trains."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # takes seconds, and scripts without PEFT need not wait

    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    modules = list(_alive(nn.Module))
    inner = {id(child) for module in modules for child in module._modules.values() if child is not None}
    best, most = None, 0
    for root in modules:
        if id(root) in inner or not any(isinstance(module, BaseTunerLayer) for module in root.modules()):
            continue
        trained = sum(id(parameter) in optimized for parameter in root.parameters())
        if trained > most:
            best, most = root, trained
    return best


def _alive(kind: type) -> Iterable[Any]:
    # By type, not isinstance: asking some lazy objects for their class makes them do things.
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]
