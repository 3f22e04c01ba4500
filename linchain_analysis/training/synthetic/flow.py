"""Gradient flow of a chain, dF_i/dt = −∂L/∂F_i: the limit of gradient descent as the learning rate goes to 0.

At time t it is where gradient descent of the rate η is after t/η steps, up to O(η). Along it F_iᵀF_i − F_{i+1}F_{i+1}ᵀ
is conserved for every pair of neighbours that train (Arora, Cohen & Hazan 2018, arXiv 1802.06509).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

from linchain_analysis.errors import InputError
from linchain_analysis.measures.spectral import spectrum
from linchain_analysis.measures.theory.gradients import factor_gradients, multiply_chain
from linchain_analysis.problems.synthetic import LinearMaps
from linchain_analysis.problems.synthetic.checking import require_number, require_whole

Floats = NDArray[np.float64]
MOST_SLOPES = 200_000  # some ten seconds for small maps; a flow that is not stiff takes hundreds to thousands


@dataclass(frozen=True)
class Flow:
    """A chain along its gradient flow.

    Attributes:
        times: (T,), as asked for; the unit is learning rate times steps.
        factors: A (T, d_in, w_0), W_i (T, w_{i-1}, w_i), B (T, w_n, d_out) at these times.
        loss: (T,).
        scale: What multiplies the product.
    """

    times: Floats
    factors: list[Floats]
    loss: Floats
    scale: float

    @cached_property
    def delta(self) -> Floats:
        """ΔW, (T, d_in, d_out)."""
        return np.asarray(self.scale * multiply_chain(self.factors))

    @cached_property
    def delta_spectrum(self) -> Floats:
        """Singular values of ΔW, (T, min(d_in, d_out)), descending."""
        return spectrum(self.delta)


def flow_chain(
    problem: LinearMaps,
    factors: Sequence[Floats],
    times: Sequence[float] | Floats,
    *,
    scale: float = 1.0,
    map: int = 0,
    trained: Sequence[bool] | None = None,
    rtol: float = 1e-10,
    atol: float | None = None,
    most_slopes: int = MOST_SLOPES,
) -> Flow:
    """Follow the gradient flow of one chain from time 0, by an explicit Runge-Kutta method of order 8.

    Args:
        problem: What is learned.
        factors: A (d_in, w_0), W_i (w_{i-1}, w_i), B (w_n, d_out) at time 0.
        times: When to look, ascending, from 0 on.
        scale: What multiplies the product.
        map: Position of the map in `problem`.
        trained: Which factors move; all by default.
        rtol: Relative tolerance of an entry per step of the integration.
        atol: Absolute tolerance; `rtol` times the largest entry of the factors by default, or of 1 where all are 0.
        most_slopes: How many gradients may be computed. A flow from large factors is stiff: the steps of an explicit
            method then shrink with the sharpness, and there may be no end of them.

    Raises:
        InputError: A problem whose loss differs from step to step, factors that do not fit it, times that go back, or
            a flow that the integration cannot follow with these tolerances and so many gradients.
    """
    if problem.batch_size is not None:
        raise InputError(
            "problem",
            expected="one loss, along whose gradient to flow",
            got=f"fresh inputs at every step (batch_size {problem.batch_size})",
            do="leave out batch_size, or give num_samples",
        )
    at = _check_times(times)
    start = [_as_reals("factors", factor, "matrices of real numbers") for factor in factors]
    _check_factors(problem, start)
    require_number("scale", scale, least=-math.inf)
    require_number("rtol", rtol, least=1e-13)  # SciPy takes no smaller one
    require_whole("map", map, least=0)
    if map >= len(problem):
        raise InputError("map", expected=f"a position below {len(problem)}", got=repr(map), do="give such a position")
    moves = [True] * len(start) if trained is None else [bool(one) for one in trained]
    if len(moves) != len(start):
        raise InputError(
            "trained", expected=f"{len(start)} values, one for each factor", got=repr(trained), do="give as many"
        )
    largest = max(float(np.abs(one).max(initial=0.0)) for one in start)
    absolute = rtol * (largest or 1.0) if atol is None else atol
    require_number("atol", absolute, above=0.0)
    require_whole("most_slopes", most_slopes, least=1)

    ends = np.cumsum([factor.size for factor in start])[:-1]
    index = np.array([map])

    def unpack(flat: Floats) -> list[Floats]:
        parts = np.split(flat, ends, axis=-1)
        return [part.reshape(*flat.shape[:-1], *f.shape) for part, f in zip(parts, start, strict=True)]

    num_slopes = 0

    def slope(time: float, flat: Floats) -> Floats:
        nonlocal num_slopes
        num_slopes += 1
        if num_slopes > most_slopes:
            raise _cannot_follow(time, f"more than {most_slopes} gradients were needed")
        now = unpack(flat[None])
        _, gradient = problem.evaluate(scale * multiply_chain(now), index)
        parts = factor_gradients(now, gradient, scale)
        return np.concatenate(
            [-part.ravel() if move else np.zeros(part.size) for part, move in zip(parts, moves, strict=True)]
        )

    flat = np.concatenate([factor.ravel() for factor in start])
    with np.errstate(over="ignore", invalid="ignore"):  # said by the status
        path = _integrate(slope, flat, at, rtol, absolute)
    found = unpack(path)
    deltas = scale * multiply_chain(found)
    loss = problem.losses(deltas, np.full(len(at), map))
    return Flow(times=at, factors=found, loss=loss, scale=scale)


def _integrate(
    slope: Callable[[float, Floats], Floats], start: Floats, times: Floats, rtol: float, atol: float
) -> Floats:
    """Return the state at each time, (T, size)."""
    if times[-1] == 0.0:
        return np.repeat(start[None], len(times), axis=0)
    if not np.isfinite(slope(0.0, start)).all():
        raise _cannot_follow(0.0, "the gradient is not finite")
    solved = solve_ivp(slope, (0.0, times[-1]), start, method="DOP853", t_eval=times, rtol=rtol, atol=atol)
    if not solved.success or not np.isfinite(solved.y).all():
        raise _cannot_follow(solved.t[-1] if len(solved.t) else 0.0, solved.message)
    return np.asarray(solved.y.T)


def _cannot_follow(time: float, why: str) -> InputError:
    return InputError(
        "times",
        expected="a flow that stays finite and can be followed",
        got=f"a failure at time {time:g}: {why}",
        do="look at earlier times, start from smaller factors, or allow larger errors (rtol)",
    )


def _as_reals(place: str, values: object, expected: str) -> Floats:
    try:
        array = np.asarray(values)
    except ValueError:  # rows of several lengths
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "biuf":
        raise InputError(place, expected=expected, got=repr(values), do="give an array of such numbers")
    return array.astype(np.float64)


def _check_times(times: Sequence[float] | Floats) -> Floats:
    at = _as_reals("times", times, "times as real numbers")
    if at.ndim != 1 or not at.size or not np.isfinite(at).all() or at[0] < 0 or (np.diff(at) <= 0).any():
        raise InputError(
            "times", expected="finite times from 0 on, each after the one before", got=repr(times), do="give them so"
        )
    return at


def _check_factors(problem: LinearMaps, factors: Sequence[Floats]) -> None:
    shapes = [factor.shape for factor in factors]
    fits = len(shapes) >= 2 and all(len(shape) == 2 for shape in shapes)
    fits = fits and all(a[1] == b[0] for a, b in pairwise(shapes))
    if not fits or (shapes[0][0], shapes[-1][1]) != problem.shape:
        raise InputError(
            "factors",
            expected=f"A, W1, …, Wn, B that can be multiplied to {problem.shape}",
            got=f"the shapes {shapes}",
            do="give two factors at least, of the sizes of the map",
        )
    if not all(np.isfinite(factor).all() for factor in factors):
        raise InputError("factors", expected="finite numbers", got="NaN or Inf", do="give finite factors")
