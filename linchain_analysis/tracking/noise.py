"""The gradient noise scale of a run that accumulates gradients, which shows gradients at two batch sizes for free."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from linchain_analysis.measures.noise import MovingAverage, gradient_noise
from linchain_analysis.tracking.gradients import norm_of_gradients

_DECAY = 0.99
_NAN = float("nan")


class NoiseScale:
    """Compares the gradient of a step's first backward pass with that of the whole step.

    The unit of batch size is one backward pass (micro-batch). Whether losses are divided by the number of passes or not
    scales both squares alike, so that the noise scale does not depend on it.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._num_passes = 0
        self._average = MovingAverage(np.zeros(2))  # of |G|² and tr Σ

    @property
    def first_norm(self) -> Tensor | None:
        """‖g‖ after the first backward pass of this step, on its device."""
        return self._first

    def add_pass(self, optimizer: Optimizer, scale: Tensor | None) -> None:
        """Take note of a backward pass that has just ended; gradients still hold `scale`."""
        self._num_passes += 1
        if self._num_passes == 1:
            self._first = norm_of_gradients(optimizer, scale)

    def go_on(self, estimates: NDArray[np.float64]) -> None:
        """Average as if this had seen the steps of a run that goes on, whose |G|² and tr Σ are (n, 2)."""
        for both in estimates:
            self._average.add(both, np.isfinite(both).all(), _DECAY)

    def forget(self) -> None:
        """Begin a step anew."""
        self._first, self._num_passes = None, 0

    def columns(self, first_norm: float, grad_norm: float) -> dict[str, list[float]]:
        """Return the columns of `steps`; NaN in a step of one backward pass.

        Args:
            first_norm: The number in `first_norm`.
            grad_norm: ‖g‖ of the whole step.
        """
        if self._num_passes < 2:
            return {"noise_gradient_square": [_NAN], "noise_trace": [_NAN], "noise_scale": [_NAN]}
        passes = float(self._num_passes)
        found = gradient_noise((first_norm * passes) ** 2, grad_norm**2, 1.0, passes)
        both = np.array([float(found.gradient_square), float(found.noise_trace)])
        square, trace = self._average.add(both, np.isfinite(both).all(), _DECAY)
        scale = trace / square if square > 0 else _NAN
        return {"noise_gradient_square": [both[0]], "noise_trace": [both[1]], "noise_scale": [scale]}
