"""Target matrices T (d_in, d_out), row-vector convention y = x T; names are read as factors are, from input to output.

`shear-rotation` is T = U · blockdiag(S_k R_k) · Vᵀ: what comes in is sheared first and rotated then. In two dimensions
U = V = I, the shear is 1 and the angle 60°; above, U (d_in, rank) and V (d_out, rank) have uniform orthonormal columns
and every 2 × 2 block has its own shear, from N(0, 1), and its own angle, uniform. All four names draw the same U, V,
shears and angles from one seed, so that their targets differ in nothing but what the name says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ANGLE = math.pi / 3  # of the two-dimensional targets
SHEAR = 1.0


def rotation(angle: float) -> Floats:
    """Return [[cos, sin], [−sin, cos]]: a row vector times it is turned counter-clockwise by `angle` radians."""
    return np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def shear(amount: float) -> Floats:
    """Return [[1, 0], [amount, 1]]: a row vector (x, y) times it is (x + amount · y, y)."""
    return np.array([[1.0, 0.0], [amount, 1.0]])


BLOCKS: Mapping[str, Callable[[float, float], Floats]] = MappingProxyType(
    {
        "rotation": lambda amount, angle: rotation(angle),
        "shear": lambda amount, angle: shear(amount),
        "shear-rotation": lambda amount, angle: shear(amount) @ rotation(angle),
        "rotation-shear": lambda amount, angle: rotation(angle) @ shear(amount),
    }
)


def draw_block_target(name: str, shape: tuple[int, int], rank: int, generator: np.random.Generator) -> Floats:
    """Return a target of `BLOCKS`; where `rank` is odd, its last block is the number 1.

    Args:
        name: Which.
        shape: d_in and d_out.
        rank: Of the target, at most min(shape).
        generator: The stream that shears, angles, U and V are drawn from, in this order.
    """
    amounts = generator.standard_normal(rank // 2)
    angles = generator.uniform(0, 2 * math.pi, size=rank // 2)
    if shape == (2, 2) and rank == 2:
        return BLOCKS[name](SHEAR, ANGLE)
    middle = np.eye(rank)
    for k, (amount, angle) in enumerate(zip(amounts, angles, strict=True)):
        middle[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = BLOCKS[name](amount, angle)
    return _embed(middle, shape, generator)


def draw_spectrum_target(
    spectrum: NDArray[np.float64], shape: tuple[int, int], generator: np.random.Generator
) -> Floats:
    """Return U diag(spectrum) Vᵀ with uniform orthonormal U and V: the given singular values, then zeros."""
    return _embed(np.diag(spectrum), shape, generator)


def _embed(middle: Floats, shape: tuple[int, int], generator: np.random.Generator) -> Floats:
    rank = len(middle)
    left, right = (np.linalg.qr(generator.standard_normal((size, rank)))[0] for size in shape)
    return np.asarray(left @ middle @ right.T)
