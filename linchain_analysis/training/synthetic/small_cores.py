"""From factors in full size to small coordinates: stacks of chains around one step, by QR of their outer factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.measures.cores import Cores

Floats = NDArray[np.float64]


def reduce_chains(
    before: Sequence[Floats],
    change: Sequence[Floats],
    gradient: Sequence[Floats] | None,
    scale: float,
    *,
    trained: Sequence[bool],
    **known: Any,
) -> Cores:
    """Return k chains around one step in small coordinates.

    With A, its update and its gradient side by side = Q_a R, the blocks of R are A, update and gradient in the basis
    Q_a, which has their products and singular values; alike for B, transposed. Only R is computed. A column of R is as
    exact as the column that it stands for, however much smaller than its neighbours (Higham 2002, Accuracy and
    stability of numerical algorithms, section 19.3): an update keeps its digits beside its factor.

    Args:
        before: The factors before the step: A (k, d_in, w_0), W_i (k, w_{i-1}, w_i), B (k, w_n, d_out), float64.
        change: After the step minus before.
        gradient: ∂L/∂F_i; None where no measure needs it.
        scale: What multiplies the product.
        trained: (m,), which factors train; the others have no gradient.
        known: Further fields of `Cores`.
    """
    count, m = len(before[0]), len(before)
    parts = [before, change] if gradient is None else [before, change, gradient]
    firsts = _reduce_columns([part[0] for part in parts])
    lasts = _reduce_columns([part[-1].swapaxes(1, 2) for part in parts])
    small = [(first, *part[1:-1], last.swapaxes(1, 2)) for first, part, last in zip(firsts, parts, lasts, strict=True)]
    if gradient is not None:
        small[2] = tuple(g if train else np.full_like(g, np.nan) for g, train in zip(small[2], trained, strict=True))
    ends = _triangle(firsts[0] + firsts[1]), _triangle(lasts[0] + lasts[1])
    return Cores(
        scale=np.full(count, scale),
        before=small[0],
        change=small[1],
        gradient=None if gradient is None else small[2],
        size=(before[0].shape[1], before[-1].shape[2]),
        trained=np.tile(np.asarray(trained), (count, 1)).reshape(count, m),
        epsilon=float(np.finfo(np.float64).eps),
        ends=ends,
        **known,
    )


def _reduce_columns(parts: Sequence[Floats]) -> list[Floats]:
    """Coordinates (k, p, w) of each part (k, d, w) in an orthonormal basis of the columns of all."""
    return np.split(_triangle(np.concatenate(parts, axis=2)), len(parts), axis=2)


def _triangle(matrix: Floats) -> Floats:
    """R of each matrix of a stack."""
    return np.asarray(np.linalg.qr(matrix, mode="r"))
