"""Optimisers of stacks of chains, one learning rate for each; the formulas and defaults are those of `torch.optim`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.errors import InputError

Floats = NDArray[np.float64]
OptimizerName = Literal["gd", "momentum", "adam", "adamw"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("gd", "momentum", "adam", "adamw")


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimiser, beside the learning rate.

    Attributes:
        name: `gd`, `momentum` (m ← μ m + g, F ← F − η m), `adam` (Kingma & Ba 2015) or `adamw` (Loshchilov & Hutter
            2019: before each step F ← F − η λ F).
        momentum: μ.
        beta1: Decay of Adam's first moment.
        beta2: Decay of its second moment.
        epsilon: Added to the root of the second moment.
        weight_decay: λ of `adamw`.
    """

    name: OptimizerName = "adam"
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise InputError(
                "optimizer", expected=f"one of {', '.join(OPTIMIZERS)}", got=repr(self.name), do="choose one of them"
            )


class StackOptimizer:
    """State of one optimiser over a stack of chains.

    Args:
        settings: Which one.
        factors: The factors, each (K, rows, columns); they are changed in place.
        rates: Learning rate of each factor of each chain, (K, m).
    """

    def __init__(self, settings: OptimizerSettings, factors: Sequence[Floats], rates: Floats) -> None:
        self._settings = settings
        self.factors = list(factors)
        self._rates = [np.ascontiguousarray(rates[:, i, None, None]) for i in range(len(self.factors))]
        self._step = 0
        num_moments = {"gd": 0, "momentum": 1}.get(settings.name, 2)
        self._moments = [[np.zeros_like(factor) for factor in self.factors] for _ in range(num_moments)]

    def step(self, gradients: Sequence[Floats]) -> None:
        """Move the factors by one step; `gradients` may be overwritten."""
        self._step += 1
        if self._settings.name == "gd":
            for factor, rate, gradient in zip(self.factors, self._rates, gradients, strict=True):
                factor -= rate * gradient
        elif self._settings.name == "momentum":
            for factor, rate, moment, gradient in zip(
                self.factors, self._rates, self._moments[0], gradients, strict=True
            ):
                moment *= self._settings.momentum
                moment += gradient
                factor -= rate * moment
        else:
            self._step_adam(gradients)

    def _step_adam(self, gradients: Sequence[Floats]) -> None:
        s = self._settings
        root_correction = np.sqrt(1 - s.beta2**self._step)
        correction = 1 - s.beta1**self._step
        for factor, rate, first, second, gradient in zip(
            self.factors, self._rates, *self._moments, gradients, strict=True
        ):
            if s.name == "adamw":
                factor *= 1 - rate * s.weight_decay
            first *= s.beta1
            first += (1 - s.beta1) * gradient
            second *= s.beta2
            gradient *= gradient
            gradient *= 1 - s.beta2
            second += gradient
            np.sqrt(second, out=gradient)
            gradient /= root_correction
            gradient += s.epsilon
            np.divide(first, gradient, out=gradient)
            gradient *= rate / correction
            factor -= gradient

    def keep(self, kept: NDArray[np.bool_]) -> None:
        """Forget the chains that are not `kept`."""
        self.factors = [factor[kept] for factor in self.factors]
        self._rates = [rate[kept] for rate in self._rates]
        self._moments = [[moment[kept] for moment in moments] for moments in self._moments]
