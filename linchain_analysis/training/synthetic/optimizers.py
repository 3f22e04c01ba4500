"""Optimisers of stacks of chains, one learning rate for each; the formulas and defaults are those of `torch.optim`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.problems.synthetic.checking import require_choice, require_number

Floats = NDArray[np.float64]
OptimizerName = Literal["gd", "momentum", "adam", "adamw"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimiser, beside the learning rate.

    Attributes:
        name: `gd`, `momentum` (m ← μ m + g, F ← F − η m), `adam` (Kingma & Ba 2015) or `adamw` (Loshchilov & Hutter
            2019: before each step F ← F − η λ F).
        momentum: μ, in [0, 1).
        beta1: Decay of Adam's first moment, in [0, 1).
        beta2: Decay of its second moment, in [0, 1).
        epsilon: Added to the root of the second moment; above 0, because the gradient of A is 0 where B is.
        weight_decay: λ of `adamw`.

    Raises:
        InputError: An unknown name or a number outside its range.
    """

    name: OptimizerName = "adam"
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        require_choice("optimizer", self.name, OPTIMIZERS)
        for place in ("momentum", "beta1", "beta2"):
            require_number(place, getattr(self, place), below=1.0)
        require_number("epsilon", self.epsilon, above=0.0)
        require_number("weight_decay", self.weight_decay)


class StackOptimizer:
    """State of one optimiser over a stack of chains.

    Args:
        settings: Which one.
        factors: The factors, each (K, rows, columns); they are changed in place.
        rates: Learning rate of each factor of each chain, (K, m). A factor whose rates are all 0 is left alone.
    """

    def __init__(self, settings: OptimizerSettings, factors: Sequence[Floats], rates: Floats) -> None:
        self._settings = settings
        self.factors = list(factors)
        self._rates = [np.ascontiguousarray(rates[:, i, None, None]) for i in range(len(self.factors))]
        self._moving = [i for i in range(len(self.factors)) if rates[:, i].any()]
        self._step = 0
        num_moments = {"gd": 0, "momentum": 1}.get(settings.name, 2)
        self._moments = [[np.zeros_like(factor) for factor in self.factors] for _ in range(num_moments)]
        self._scratch = [np.empty_like(factor) for factor in self.factors]

    def step(self, gradients: Sequence[Floats]) -> None:
        """Move the factors by one step; `gradients` are left as they are."""
        self._step += 1
        for i in self._moving:
            factor, rate, gradient, scratch = self.factors[i], self._rates[i], gradients[i], self._scratch[i]
            if self._settings.name == "gd":
                np.multiply(gradient, rate, out=scratch)
            elif self._settings.name == "momentum":
                moment = self._moments[0][i]
                moment *= self._settings.momentum
                moment += gradient
                np.multiply(moment, rate, out=scratch)
            else:
                if self._settings.name == "adamw":
                    factor *= 1 - rate * self._settings.weight_decay
                self._scale_by_moments(i, gradient, scratch)
                scratch *= rate / (1 - self._settings.beta1**self._step)
            factor -= scratch

    def _scale_by_moments(self, i: int, gradient: Floats, out: Floats) -> None:
        s, first, second = self._settings, self._moments[0][i], self._moments[1][i]
        first *= s.beta1
        np.multiply(gradient, 1 - s.beta1, out=out)
        first += out
        second *= s.beta2
        np.multiply(gradient, gradient, out=out)
        out *= 1 - s.beta2
        second += out
        np.sqrt(second, out=out)
        out *= 1 / math.sqrt(1 - s.beta2**self._step)
        out += s.epsilon
        np.divide(first, out, out=out)

    def keep(self, kept: NDArray[np.bool_]) -> None:
        """Forget the chains that are not `kept`."""
        self.factors = [factor[kept] for factor in self.factors]
        self._rates = [rate[kept] for rate in self._rates]
        self._moments = [[moment[kept] for moment in moments] for moments in self._moments]
        self._scratch = [np.empty_like(factor) for factor in self.factors]
