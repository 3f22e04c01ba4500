"""From the small parts of a chain to the core: the small matrix with the singular values of delta or of its update.

Legend, all float64 stacks over k modules of one shape:
    left (k, p, w_0) the triangular factor R of A (d_in, w_0) = QR, p = min(d_in, w_0)
    inner [(k, w_0, w_1), …, (k, w_{n-1}, w_n)] the inner factors W1 … Wn
    right (k, q, w_n) the triangular factor R of Bᵀ (d_out, w_n) = QR, q = min(d_out, w_n)
With A = Q_a left and Bᵀ = Q_b right, A W1 … Wn B = Q_a (left W1 … Wn rightᵀ) Q_bᵀ, and Q_a, Q_b change no singular
value.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from linchain_analysis.measures.spectral import Array


def chain_core(left: Array, inner: Sequence[Array], right: Array) -> Array:
    """Return left W1 … Wn rightᵀ, (k, p, q): the singular values of A W1 … Wn B."""
    product = left
    for factor in inner:
        product = product @ factor
    return np.asarray(product @ np.swapaxes(right, -1, -2))


def update_core(left: Array, inner_before: Sequence[Array], inner_after: Sequence[Array], right: Array) -> Array:
    """Return the core of A'W1' … Wn'B' − A W1 … Wn B without subtracting the two products.

    With dF = F' − F and the prefix product P_i = A W1 … W_i, the difference telescopes as
    [P_i | dP_i] = [P_{i-1} | dP_{i-1}] [[W_i, dW_i], [0, W_i']], so that it is
    [A | dA] M1 … Mn [dB; B'] with M_i the 2 × 2 block matrix. Subtracting the products instead loses all digits of a
    small step.

    Args:
        left: (k, p, 2 w_0) triangular factor of [A | dA].
        inner_before: W1 … Wn before, each (k, w_{i-1}, w_i).
        inner_after: W1' … Wn' after, alike.
        right: (k, q, 2 w_n) triangular factor of [dB; B']ᵀ.

    Returns:
        (k, p, q)
    """
    product = left
    for before, after in zip(inner_before, inner_after, strict=True):
        width = before.shape[-2]
        old, change = product[..., :width], product[..., width:]
        product = np.concatenate([old @ before, old @ (after - before) + change @ after], axis=-1)
    return np.asarray(product @ np.swapaxes(right, -1, -2))
