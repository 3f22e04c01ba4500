"""What the steps so far show of each factor: whether gradients reach it, whether it moves, whether it is zero."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.optim import Optimizer

from linchain_analysis.probes import Chain
from linchain_analysis.tracking.observers import FinishedStep
from linchain_analysis.tracking.subjects import Mask

_NAN = float("nan")


class Evidence:
    """Counts, by row of the table `factors`, what is asked about later. A step costs a few sums over the rows.

    Args:
        chains: The modules that are recorded.
        optimizer: Trains them; kept weakly.

    Attributes:
        num_steps: Steps seen.
        num_recorded: Steps recorded whole.
        num_skipped: Skipped steps in a row, up to now.
        had_gradient: Which factors had a gradient other than zero in any recorded step.
        held_gradient: Which had a gradient at all, be it zero.
        moved: Which changed in any recorded step, or between two of them: another optimiser may be what moves them.
        began_at_zero: Which were zero before the first recorded step.
        was_nonzero: Which were other than zero after any recorded step.
        without_gradient: Recorded steps in a row, up to now, without a gradient other than zero.
        unmoved: Recorded steps in a row, up to now, in which nothing but the update was zero.
        with_rate: Steps that happened with a learning rate other than zero.
        without_rate: Steps in a row, up to now, that happened with a learning rate of zero.
    """

    def __init__(self, chains: Sequence[Chain], optimizer: Optimizer) -> None:
        self._parameters = [factor.parameter for chain in chains for factor in chain.factors]
        self._optimizer = weakref.ref(optimizer)
        self._group_counts: list[int] = []
        n = len(self._parameters)
        self._group_of = np.full(n, -1)
        self.num_steps = self.num_recorded = self.num_skipped = 0
        self.had_gradient, self.held_gradient = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        self.moved, self.was_nonzero = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        self.began_at_zero = np.zeros(n, dtype=bool)
        self._last_weights = np.full(n, _NAN)
        self.without_gradient, self.unmoved = np.zeros(n, dtype=int), np.zeros(n, dtype=int)
        self.with_rate, self.without_rate = np.zeros(n, dtype=int), np.zeros(n, dtype=int)

    def add(self, finished: FinishedStep) -> None:
        """Count one step."""
        self.num_steps += 1
        skipped = bool(finished.values.get("skipped"))
        self.num_skipped = self.num_skipped + 1 if skipped else 0
        rates = self._rates(finished.values.get("learning_rate", _NAN))
        idle = rates == 0
        if not skipped:
            self.with_rate += ~idle
            self.without_rate = np.where(idle, self.without_rate + 1, 0)
        if finished.reading is None:
            return
        self.num_recorded += 1
        columns = finished.reading.factors
        gradients, weights = columns["grad_norm"], columns["weight_norm"]
        if self.num_recorded == 1:
            self._last_weights = weights
            self.began_at_zero = np.isnan(columns["update_ratio"]) & np.isfinite(columns["update_norm"])
        # NaN stands for no gradient and for one that is NaN; these are told apart where it matters.
        reached = (gradients > 0) | self._are_nan(gradients, finished.values.get("grad_norm", _NAN))
        self.had_gradient |= reached
        self.held_gradient |= reached | (gradients == 0)
        self.without_gradient = np.where(reached, 0, self.without_gradient + 1)
        self.moved |= (columns["update_norm"] > 0) | (weights != self._last_weights)
        self.was_nonzero |= weights != 0
        self._last_weights = weights
        if not skipped:
            stuck = (gradients > 0) & np.isfinite(gradients) & ~idle & (columns["update_norm"] == 0)
            self.unmoved = np.where(stuck, self.unmoved + 1, 0)

    def optimized(self) -> Mask:
        """Which factors are parameters of the optimiser."""
        self._find_groups()
        return self._group_of >= 0

    def required(self) -> Mask:
        """Which factors require a gradient."""
        return np.array([parameter.requires_grad for parameter in self._parameters], dtype=bool)

    def held_here(self) -> Mask:
        """Which factors this process holds something of: sharding leaves some empty."""
        return np.array([parameter.numel() > 0 for parameter in self._parameters], dtype=bool)

    def broken_gradients(self, finished: FinishedStep) -> Mask:
        """Which factors have a gradient with NaN or Inf in this recorded step."""
        assert finished.reading is not None
        gradients = finished.reading.factors["grad_norm"]
        return np.isinf(gradients) | self._are_nan(gradients, finished.values.get("grad_norm", _NAN))

    def any_gradient(self) -> bool:
        """Whether any parameter of the optimiser has a gradient now."""
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        return any(parameter.grad is not None for group in groups for parameter in group["params"])

    def short_types(self) -> Mask:
        """Which factors are of a type of less than 32 bits."""
        return np.array([parameter.dtype.itemsize < 4 for parameter in self._parameters], dtype=bool)

    def dtypes(self, rows: Mask) -> str:
        """Data types of some factors, by name."""
        return " and ".join(
            dict.fromkeys(str(self._parameters[row].dtype).removeprefix("torch.") for row in np.flatnonzero(rows))
        )

    def _are_nan(self, norms: NDArray[np.float64], total: float) -> Mask:
        """Which norms are NaN because the gradient is, not because there is none."""
        unknown = np.isnan(norms)
        if np.isfinite(total) or not unknown.any():  # the total covers them all
            return np.zeros(len(norms), dtype=bool)
        for row in np.flatnonzero(unknown):
            unknown[row] = self._parameters[row].grad is not None
        return unknown

    def _rates(self, first: float) -> NDArray[np.float64]:
        """Learning rate of each factor in this step; NaN for those that are not in the optimiser."""
        self._find_groups()
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        rates = np.array([*(_rate(group.get("lr", _NAN), first) for group in groups), _NAN])
        return np.asarray(rates[self._group_of])

    def _find_groups(self) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        counts = [len(group["params"]) for group in optimizer.param_groups]
        if counts != self._group_counts:
            self._group_counts = counts
            homes = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
            self._group_of = np.array([homes.get(id(parameter), -1) for parameter in self._parameters], dtype=int)


def _rate(rate: Any, first: float) -> float:
    """A learning rate as a number; the first group's, which is known already, where one would have to be waited for."""
    device = getattr(rate, "device", None)
    return first if device is not None and device.type != "cpu" else float(rate)
