"""Closed-form gradients of a chain, and the paper's printed ones beside them.

Legend: factors F_0 = A (…, d_in, w_0), F_i = W_i (…, w_{i-1}, w_i), F_{n+1} = B (…, w_n, d_out) of
ΔW = scale · A W1 … Wn B, row-vector convention y = x (W0 + ΔW); G = ∂L/∂ΔW (…, d_in, d_out), which is xᵀ ∂L/∂y summed
over tokens; L_i = F_0 … F_{i-1}, R_i = F_{i+1} … F_{n+1}. Leading axes are a stack of chains.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.errors import InputError
from linchain_analysis.measures.cores import norm, ratio
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


def first_gradient(factors: Sequence[Array], gradient: Array, scale: float | Array = 1.0) -> Array:
    """Return ∂L/∂A = scale · G Bᵀ W_chainᵀ, (…, d_in, w_0): Eq. 7 of the paper, G = xᵀΔ, W_chain = W1 … Wn."""
    to_right = gradient @ _transposed(factors[-1])
    return _times(scale, to_right @ _transposed(multiply_chain(factors[1:-1])) if len(factors) > 2 else to_right)


def last_gradient(factors: Sequence[Array], gradient: Array, scale: float | Array = 1.0) -> Array:
    """Return ∂L/∂B = scale · W_chainᵀ Aᵀ G, (…, w_n, d_out): Eq. 8 of the paper."""
    from_left = _transposed(factors[0]) @ gradient
    return _times(scale, _transposed(multiply_chain(factors[1:-1])) @ from_left if len(factors) > 2 else from_left)


def inner_gradient(factors: Sequence[Array], i: int, gradient: Array, scale: float | Array = 1.0) -> Array:
    """Return ∂L/∂W_i = scale · L_iᵀ G R_iᵀ, (…, w_{i-1}, w_i): what Eqs. 9 to 11 of the paper should say.

    With Eq. 9's core AᵀGBᵀ it is (W_1 … W_{i-1})ᵀ · AᵀGBᵀ · (W_{i+1} … W_n)ᵀ: the matrices before W_i stand on the
    left, and both products keep their order. ∂W_chain/∂W_i itself (Eq. 10) has four indices and is no matrix.

    Args:
        factors: A, W1, …, Wn, B.
        i: Which inner factor, 1 … n.
        gradient: G.
        scale: A number, or one for each chain of the stack.

    Raises:
        InputError: There is no W_i.
    """
    _check_inner(factors, i)
    left, right = multiply_chain(factors[:i]), multiply_chain(factors[i + 1 :])
    return _times(scale, _transposed(left) @ gradient @ _transposed(right))


def printed_inner_gradient(
    factors: Sequence[Array], i: int, gradient: Array, scale: float | Array = 1.0
) -> Array | None:
    """Return what Eq. 11 of the paper prints for ∂L/∂W_i: AᵀGBᵀ · W_postᵀ · W_preᵀ, to the letter.

    W_pre = W_{i-1} … W_1 and W_post = W_n … W_{i+1}, as Eq. 10 defines them: in reversed order, and both on the right.
    It agrees with `inner_gradient` for i = 1 and n ≤ 2 alone, where no more than one matrix is left over and belongs on
    the right. (Chains of matrices that commute and are symmetric, such as identities, do not show the difference.)

    Args:
        factors: A, W1, …, Wn, B.
        i: Which inner factor, 1 … n.
        gradient: G.
        scale: As in `inner_gradient`; the paper has none.

    Returns:
        The product, whatever its shape; None where the shapes do not multiply, as for W_2 of widths 8, 16, 8.

    Raises:
        InputError: There is no W_i.
    """
    _check_inner(factors, i)
    inner = factors[1:-1]
    behind, ahead = inner[i:][::-1], inner[: i - 1][::-1]  # of W_post and of W_pre, as they are printed
    product = _transposed(factors[0]) @ gradient @ _transposed(factors[-1])
    for printed in (behind, ahead):
        for matrix in reversed(printed):
            # The transpose of a product is that of its factors from the last to the first.
            if product.shape[-1] != matrix.shape[-1]:
                return None
            product = product @ _transposed(matrix)
    return _times(scale, product)


def printed_errors(factors: Sequence[Array], gradient: Array) -> Array:
    """Return ‖printed − right‖/‖right‖ of ∂L/∂W_i for i = 1 … n, (…, n), leading axes broadcast.

    NaN where the printed product does not exist, has another shape than W_i, or the right gradient is 0.
    """
    found = []
    for i in range(1, len(factors) - 1):
        right, printed = inner_gradient(factors, i, gradient), printed_inner_gradient(factors, i, gradient)
        if printed is None or printed.shape[-2:] != right.shape[-2:]:
            found.append(np.full(right.shape[:-2], np.nan))
        else:
            found.append(ratio(norm(printed - right), norm(right)))
    # The gradient of W_i does not hold W_i, and so lacks the stack where that is the only one stacked.
    stack = np.broadcast_shapes(gradient.shape[:-2], *(factor.shape[:-2] for factor in factors))
    errors = [np.broadcast_to(error, stack) for error in found]
    return np.stack(errors, axis=-1) if errors else np.zeros((*stack, 0))


def _check_inner(factors: Sequence[Array], i: int) -> None:
    num_inner = len(factors) - 2
    if not 1 <= i <= num_inner:
        said = f"1 to {num_inner}" if num_inner > 0 else "a chain with an inner factor"
        raise InputError("inner factor", expected=said, got=str(i), do="count inner factors from 1")


def _transposed(matrix: Array) -> Array:
    return matrix.swapaxes(-1, -2)


def _times(scale: float | Array, matrix: Array) -> Array:
    return np.asarray((np.asarray(scale)[..., None, None] if np.ndim(scale) else scale) * matrix)
