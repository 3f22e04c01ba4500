"""Closed-form gradients of a chain, and the paper's printed ones beside them.

Legend: factors F_0 = A (…, d_in, w_0), F_i = W_i (…, w_{i-1}, w_i), F_{n+1} = B (…, w_n, d_out) of
ΔW = scale · A W1 … Wn B, row-vector convention y = x (W0 + ΔW); G = ∂L/∂ΔW (…, d_in, d_out), which is xᵀ ∂L/∂y summed
over tokens; L_i = F_0 … F_{i-1}, R_i = F_{i+1} … F_{n+1}. Leading axes are a stack of chains.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.measures.spectral import Array

Floats = NDArray[np.float64]


def multiply_chain(factors: Sequence[Array]) -> Array:
    """Return F_0 F_1 … F_{n+1}, (…, d_in, d_out), from the small end: the inner product first."""
    product = factors[-1]
    for factor in factors[-2::-1]:
        product = factor @ product
    return product


def factor_gradients(factors: Sequence[Array], gradient: Array, scale: float | Array = 1.0) -> list[Array]:
    """Return ∂L/∂F_i = scale · L_iᵀ G R_iᵀ of every factor: Eqs. 7 and 8 of the paper, and the right form of 9 to 11.

    Only two products are as large as the map; the inner factors' gradients come of the small A~ᵀ G B~ᵀ.

    Args:
        factors: A, W1, …, Wn, B, two at least.
        gradient: G.
        scale: A number, or one for each chain of the stack.
    """
    first, *inner, last = factors
    factor = np.asarray(scale)[..., None, None] if np.ndim(scale) else scale
    from_left = first.swapaxes(-1, -2) @ gradient  # AᵀG (…, w_0, d_out)
    to_right = gradient @ last.swapaxes(-1, -2)  # GBᵀ (…, d_in, w_n)
    if not inner:
        return [factor * to_right, factor * from_left]
    core = from_left @ last.swapaxes(-1, -2)  # AᵀGBᵀ (…, w_0, w_n)
    after: list[Array | None] = [None]  # W_{i+1} … W_n, from the last inner factor on
    for matrix in inner[:0:-1]:
        after.append(matrix if after[-1] is None else matrix @ after[-1])
    found, before = [], None  # before: W_1 … W_{i-1}
    for matrix, right in zip(inner, reversed(after), strict=True):
        part = core if before is None else before.swapaxes(-1, -2) @ core
        found.append(factor * (part if right is None else part @ right.swapaxes(-1, -2)))
        before = matrix if before is None else before @ matrix
    assert before is not None
    chain = before.swapaxes(-1, -2)  # (W_1 … W_n)ᵀ
    return [factor * (to_right @ chain), *found, factor * (chain @ from_left)]
