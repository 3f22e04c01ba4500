"""Gradient noise scale: how large a batch still helps, from squared gradient norms at two batch sizes.

With G the gradient over all data and Σ the covariance over single examples, the gradient of a batch of B examples has
E|G_B|² = |G|² + tr Σ/B, so that two batch sizes determine both unknowns (McCandlish et al. 2018, arXiv 1812.06162,
appendix A.1). The simple noise scale tr Σ/|G|² is in examples, whatever an example is as B counts (sequences, tokens).

Batches must be drawn alike, their loss a mean over examples. Where a step accumulates micro-batches, the small
square is the mean of |g|² over them and the big one that of their mean gradient, at no extra cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.errors import InputError
from linchain_analysis.measures.cores import ratio
from linchain_analysis.measures.spectral import Array


@dataclass(frozen=True)
class GradientNoise:
    """Estimates of both parts of the gradient, (...,) or (..., steps).

    Attributes:
        gradient_square: |G|²; each single estimate is unbiased and may come out negative.
        noise_trace: tr Σ, alike.
    """

    gradient_square: Array
    noise_trace: Array

    @property
    def scale(self) -> Array:
        """B_simple = tr Σ/|G|² in examples; NaN where the estimate of |G|² is not positive.

        Where the estimate of tr Σ came out negative so does this: cut off at 0, an average of it would be too large.
        Being a ratio it is biased even so; average both parts first (`smooth`).
        """
        return ratio(self.noise_trace, np.where(self.gradient_square > 0, self.gradient_square, np.nan))


def gradient_noise(
    small_square: float | NDArray[Any],
    big_square: float | NDArray[Any],
    small_batch: float | NDArray[Any],
    big_batch: float | NDArray[Any],
) -> GradientNoise:
    """Return the unbiased estimates of |G|² and tr Σ.

    |G|² = (B |G_B|² − b |G_b|²)/(B − b) and tr Σ = (|G_b|² − |G_B|²)/(1/b − 1/B) for sizes b < B.

    Args:
        small_square: |G_b|², (...,); all arguments broadcast. NaN or Inf gives NaN.
        big_square: |G_B|², (...,).
        small_batch: b in examples.
        big_batch: B in examples.
    """
    small, big = np.asarray(small_batch, dtype=np.float64), np.asarray(big_batch, dtype=np.float64)
    if not np.all((small > 0) & (small < big) & np.isfinite(big)):
        raise InputError(
            "small_batch, big_batch",
            expected="0 < small_batch < big_batch",
            got=f"{small_batch} and {big_batch}",
            do="measure the gradient at two batch sizes",
        )
    pair = np.broadcast_arrays(np.asarray(small_square, dtype=np.float64), np.asarray(big_square, dtype=np.float64))
    usable = np.isfinite(pair[0]) & np.isfinite(pair[1])
    of_small, of_big = (np.where(usable, square, np.nan) for square in pair)
    # |G|² as |G_B|² − b (|G_b|² − |G_B|²)/(B − b): the squares are multiplied by ratios of sizes only.
    excess = of_small - of_big
    return GradientNoise(
        gradient_square=np.asarray(of_big - excess * (small / (big - small))),
        noise_trace=np.asarray(excess * (small * (big / (big - small)))),
    )


@dataclass
class MovingAverage:
    """An exponential moving average corrected for its start: Σ_i decay^(t−i) x_i / Σ_i decay^(t−i).

    Attributes:
        value: The average so far, of any shape; 0 before anything is added.
        weight: (1 − decay) Σ_i decay^(t−i), where values were observed.
    """

    value: Array
    weight: Array = field(default_factory=lambda: np.zeros(()))

    def add(self, value: Array, observed: Any, decay: float) -> Array:
        """Add a value where it is observed, and return the average, NaN where nothing has been observed yet."""
        self.weight = np.where(observed, decay * self.weight + (1 - decay), self.weight)
        gain = (1 - decay) / np.where(self.weight > 0, self.weight, 1.0)
        # The corrected average itself is carried, so that a constant stays that constant to the last digit.
        self.value = np.where(observed, self.value + gain * (value - self.value), self.value)
        return np.where(self.weight > 0, self.value, np.nan)


def smooth(noise: GradientNoise, *, decay: float = 0.99) -> GradientNoise:
    """Return exponential moving averages of |G|² and of tr Σ along the last axis, each with its own.

    After t observed steps the average is Σ_i decay^(t−i) x_i / Σ_i decay^(t−i): unbiased from the first step on. Its
    `scale`, the ratio of averages, is how the noise scale is read off a run. A step where either is NaN is passed
    over: the averages stay as they were, and are NaN before the first observed step.

    Args:
        noise: (..., steps) estimates.
        decay: In [0, 1); the average looks back about 1/(1 − decay) steps.
    """
    if not 0 <= decay < 1:
        raise InputError("decay", expected="a number in [0, 1)", got=str(decay), do="take 0.99 for about 100 steps")
    values = np.stack(np.broadcast_arrays(noise.gradient_square, noise.noise_trace))
    if values.ndim < 2:
        raise InputError("noise", expected="an axis of steps", got="single numbers", do="give one estimate per step")
    observed = np.isfinite(values).all(axis=0)
    averages = np.empty_like(values)
    average = MovingAverage(np.zeros(values.shape[:-1]))
    for step in range(values.shape[-1]):
        averages[..., step] = average.add(values[..., step], observed[..., step], decay)
    return GradientNoise(gradient_square=averages[0], noise_trace=averages[1])
