"""Stacks of chains as the adapters start them, drawn in NumPy: the same distributions, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from linchain_analysis.errors import InputError
from linchain_analysis.measures.spectral import Array
from linchain_analysis.method_names import CHAIN_INITS, UNIFORM_GAINS


def draw_first_factor(d_in: int, rank: int, generator: np.random.Generator) -> Array:
    """Return A (d_in, r), uniform on ± 1/√d_in: PEFT's Kaiming uniform with a = √5."""
    return draw_uniform((d_in, rank), UNIFORM_GAINS["kaiming"], generator)


def draw_inner_factor(shape: tuple[int, int], init: str, generator: np.random.Generator) -> Array:
    """Return one W_i (w_{i-1}, w_i).

    Args:
        shape: Its shape.
        init: One of `method_names.CHAIN_INITS`: `identity` is ones on the diagonal, `orthogonal` is uniform over
            matrices with orthonormal rows or columns, whichever are fewer, the others are uniform on
            ± gain · √(3 / w_{i-1}).
        generator: The stream that it is drawn from; `identity` draws nothing.

    Raises:
        InputError: An init that is not known.
    """
    if init in UNIFORM_GAINS:
        return draw_uniform(shape, UNIFORM_GAINS[init], generator)
    if init == "identity":
        return np.eye(*shape)
    if init == "orthogonal":
        return draw_orthogonal(shape, generator)
    raise InputError("init", expected=f"one of {', '.join(CHAIN_INITS)}", got=repr(init), do="choose one of them")


def draw_inner_factors(widths: Sequence[int], init: str, generator: np.random.Generator) -> list[Array]:
    """Return W1 … Wn for the widths w_0 … w_n."""
    return [draw_inner_factor(shape, init, generator) for shape in pairwise(widths)]


def draw_uniform(shape: tuple[int, int], gain: float, generator: np.random.Generator) -> Array:
    """Return a matrix uniform on ± gain · √(3 / rows): variance gain² / rows."""
    bound = gain * math.sqrt(3 / shape[0])
    return generator.uniform(-bound, bound, shape)


def draw_orthogonal(shape: tuple[int, int], generator: np.random.Generator) -> Array:
    """Return a matrix with orthonormal columns, or rows where these are fewer, uniform among them (Mezzadri 2007)."""
    tall = (max(shape), min(shape))
    q, r = np.linalg.qr(generator.standard_normal(tall))
    # QR alone leaves the signs to LAPACK, which is not uniform.
    q = q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
    return np.ascontiguousarray(q if tall == tuple(shape) else q.T)
