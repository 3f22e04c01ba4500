"""The parameters of one optimiser: which backward passes are about them, and what it does with each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from linchain_analysis.probes import Chain
from linchain_analysis.probes.shards import accumulated, find_accumulators, is_sharded, local_part

_NAN = float("nan")


class WatchedParameters:
    """Parameters by which a backward pass or a clipping is recognised as an optimiser's, each once.

    Args:
        chains: Whose factors are among them.
        model: Where it is sharded, it knows of gradients that parameters do not.
    """

    def __init__(self, chains: Sequence[Chain], model: nn.Module | None = None) -> None:
        self._factors = [factor.parameter for chain in chains for factor in chain.factors]
        self._accumulators = {} if model is None else find_accumulators(model)
        self._parameters: list[nn.Parameter] = []
        self._before: list[tuple[int, ...]] = []

    def look_up(self, optimizer: Optimizer) -> None:
        """Take the parameters that `optimizer` has now."""
        optimized = (parameter for group in optimizer.param_groups for parameter in group["params"])
        self._parameters = list({id(p): p for p in (*optimized, *self._factors)}.values())

    @property
    def have_no_gradient(self) -> bool:
        """Whether none of them has one."""
        return all(
            parameter.grad is None and accumulated(self._accumulators.get(id(parameter))) is None
            for parameter in self._parameters
        )

    def include_any(self, identities: set[int]) -> bool:
        """Whether one of these is among them."""
        return any(id(parameter) in identities for parameter in self._parameters)

    def note_gradients(self) -> None:
        """Remember which state the gradients are in."""
        self._before = [self._state(parameter) for parameter in self._parameters]

    @property
    def have_changed(self) -> bool:
        """Whether a gradient is not what it was when the gradients were noted."""
        pairs = zip(self._parameters, self._before, strict=True)
        return any(self._state(parameter) != before for parameter, before in pairs)

    def _state(self, parameter: nn.Parameter) -> tuple[int, ...]:
        if not self._accumulators:  # nearly always; and it is asked of every parameter twice in each backward pass
            grad = parameter.grad
            return (0, 0) if grad is None else (id(grad), grad._version)
        held = (parameter.grad, accumulated(self._accumulators.get(id(parameter))))
        states = ((id(g), local_part(g)._version if is_sharded(g) else g._version) for g in held if g is not None)
        return tuple(number for state in states for number in state)


def optimized_rows(optimizer: Optimizer, chains: Sequence[Chain]) -> tuple[NDArray[np.bool_], set[int]]:
    """Return which rows of `factors` are parameters of the optimiser, each counted once, and their identities."""
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


def learning_rates(optimizer: Optimizer, last: dict[int, float]) -> dict[int, float]:
    """Return learning rates by the identity of the parameter: the one before, or the group's own, where it is 0 now.

    What is asked of them is their ratio between factors, which a warm-up from 0 does not change.
    """
    rates = {}
    for group in optimizer.param_groups:
        rate = float(group.get("lr", _NAN)) or float(group.get("initial_lr", 0.0))
        rates.update({id(parameter): rate or last.get(id(parameter), 0.0) for parameter in group["params"]})
    return rates
