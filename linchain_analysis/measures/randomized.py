"""Leading singular vectors of a big matrix, or of one that is a sum, by random sampling.

W₀ and W₀ + ΔW are used through products with a few dozen columns: the sum is never formed, and a frozen weight of low
precision is widened to float64 block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from linchain_analysis.errors import InputError
from linchain_analysis.measures.spectral import Array
from linchain_analysis.measures.subspaces import Directions, drop_arbitrary

_BLOCK = 2**22  # numbers of W₀ widened at a time: 32 MiB


def weight_operator(base: Any, factors: Sequence[NDArray[Any]] = (), *, scale: float = 1.0) -> Any:
    """Return W₀ + scale · A W1 … Wn B as a LinearOperator: X ↦ W₀ X + scale · A(W1(…(B X))), and its transpose.

    Args:
        base: W₀ (d_in, d_out), an array of any real dtype (a memory map does), or a LinearOperator.
        factors: A (d_in, w_0), W1 … Wn, B (w_n, d_out); none for W₀ itself.
        scale: That of the chain.
    """
    chain = [np.asarray(factor, dtype=np.float64) for factor in factors]
    sizes = [tuple(base.shape), *((factor.shape[0], factor.shape[1]) for factor in chain)]
    inner = all(left[1] == right[0] for left, right in pairwise(sizes[1:]))
    if len(sizes[0]) != 2 or (chain and (not inner or (sizes[1][0], sizes[-1][1]) != sizes[0])):
        raise InputError(
            "base, factors",
            expected="W₀ (d_in, d_out) and a chain from d_in to d_out",
            got=f"{sizes[0]} and {sizes[1:]}",
            do="transpose weights of nn.Linear",
        )

    def times(block: Array) -> Array:
        product = _base_times(base, block)
        return product + scale * _through(chain, block) if chain else product

    def transposed_times(block: Array) -> Array:
        product = _transposed_base_times(base, block)
        return product + scale * _through([factor.T for factor in reversed(chain)], block) if chain else product

    return LinearOperator(
        sizes[0],
        matvec=lambda vector: times(vector.reshape(-1, 1)),
        rmatvec=lambda vector: transposed_times(vector.reshape(-1, 1)),
        matmat=times,
        rmatmat=transposed_times,
        dtype=np.float64,
    )


def randomized_svd(
    matrix: Any, count: int, *, oversampling: int = 10, num_power_iterations: int = 2, seed: int = 0
) -> Directions:
    """Return the leading singular triplets of one matrix, approximately (Halko, Martinsson & Tropp 2011, SIAM Rev.).

    Their algorithms 4.4 and 5.1: the range of M Ω, Ω Gaussian with count + oversampling columns, after power iterations
    with a QR decomposition after every product. 2 + 2 · num_power_iterations products with M or Mᵀ. Good to rounding
    for a matrix whose rank is at most the number of columns; else the triplets near the last are the least accurate,
    by about (σ_{count + oversampling + 1}/σ_i)^(2 · num_power_iterations + 1). `triplet_residuals` says how much.

    Args:
        matrix: (d_in, d_out), an array or a LinearOperator with `matmat` and `rmatmat`; see `weight_operator`.
        count: K, 1 … min(d_in, d_out).
        oversampling: Further columns.
        num_power_iterations: q.
        seed: Of Ω; the global generator is left alone.

    Returns:
        The triplets. Of a zero matrix sigma is 0 and every vector NaN; of one that holds NaN or Inf all is NaN.
    """
    operator = matrix if isinstance(matrix, LinearOperator) else weight_operator(matrix)
    rows, columns = operator.shape
    if not 1 <= count <= min(rows, columns):
        raise InputError("count", expected=f"1 to {min(rows, columns)}", got=str(count), do="ask for fewer vectors")
    width = min(count + oversampling, rows, columns)
    sample = np.random.default_rng(seed).standard_normal((columns, width))
    basis, _ = np.linalg.qr(operator.matmat(sample))
    for _ in range(num_power_iterations):
        basis, _ = np.linalg.qr(operator.matmat(np.linalg.qr(operator.rmatmat(basis))[0]))
    other, triangle = np.linalg.qr(operator.rmatmat(basis))
    if not np.isfinite(triangle).all():
        nothing = np.full(count, np.nan)
        return drop_arbitrary(np.full((rows, count), np.nan), nothing, np.full((columns, count), np.nan))
    # M ≈ Q (Mᵀ Q)ᵀ = Q triangleᵀ otherᵀ
    u, sigma, vt = np.linalg.svd(triangle.T)
    return drop_arbitrary(basis @ u[:, :count], sigma[:count], other @ vt[:count].T)


def triplet_residuals(matrix: Any, directions: Directions) -> Array:
    """Return ‖M v_i − σ_i u_i‖ of each triplet of `randomized_svd`, (K,), in the unit of M; NaN without vectors.

    Its triplets satisfy Mᵀ u_i = σ_i v_i as they come. With E = M V − U Σ they are therefore exact triplets of
    M − E Vᵀ, a matrix within √Σ‖E_i‖² of M: what is concluded from them is true of that matrix.
    """
    operator = matrix if isinstance(matrix, LinearOperator) else weight_operator(matrix)
    return np.asarray(np.linalg.norm(operator.matmat(directions.right) - directions.left * directions.sigma, axis=0))


def vector_errors(sigma: NDArray[Any], residuals: NDArray[Any]) -> Array:
    """Return a bound on the sine of the angle between each computed singular vector and the true one, 0 … 1.

    sin θ_i ≤ ρ_i/δ_i with ρ_i the residual and δ_i the distance from σ_i to every other singular value of M and to 0
    (Wedin 1972, BIT 12). Another value lies within its own residual of σ_j; those beyond the K are taken to lie below
    the last, so that the last vector always has 1 unless its residual is 0. 1 also where values are too close to tell
    their vectors apart, as in the bulk of a random matrix: more power iterations help there, or nothing does.

    Args:
        sigma: (K,) of the computed triplets, descending.
        residuals: (K,) as `triplet_residuals` returns them; NaN gives NaN.
    """
    sigma, residuals = np.asarray(sigma, dtype=np.float64), np.asarray(residuals, dtype=np.float64)
    apart = np.abs(sigma[:, None] - sigma) - np.nan_to_num(residuals)
    np.fill_diagonal(apart, np.inf)
    gap = np.minimum(apart.min(axis=1), sigma)
    gap[-1:] = 0.0
    error = np.divide(residuals, gap, out=np.ones_like(sigma), where=gap > 0)
    error[residuals == 0] = 0.0
    return np.asarray(np.where(np.isnan(residuals), np.nan, np.minimum(error, 1.0)))


def keep_accurate(directions: Directions, errors: NDArray[Any], *, limit: float = 0.1) -> Directions:
    """Put NaN for the vectors whose error (`vector_errors`) exceeds the limit, so that they count as unknown."""
    kept = np.asarray(errors) <= limit
    return replace(
        directions, left=np.where(kept, directions.left, np.nan), right=np.where(kept, directions.right, np.nan)
    )


def _base_times(base: Any, block: Array) -> Array:
    """W₀ X, (d_in, columns), float64."""
    if isinstance(base, LinearOperator):
        return np.asarray(base.matmat(block), dtype=np.float64)
    product = np.empty((base.shape[0], block.shape[1]))
    for rows in _row_blocks(base):
        product[rows] = np.asarray(base[rows], dtype=np.float64) @ block
    return product


def _transposed_base_times(base: Any, block: Array) -> Array:
    """W₀ᵀ X, (d_out, columns), float64."""
    if isinstance(base, LinearOperator):
        return np.asarray(base.rmatmat(block), dtype=np.float64)
    product = np.zeros((base.shape[1], block.shape[1]))
    for rows in _row_blocks(base):
        product += np.asarray(base[rows], dtype=np.float64).T @ block[rows]
    return product


def _row_blocks(base: Any) -> list[slice]:
    height = max(1, _BLOCK // max(1, base.shape[1]))
    return [slice(start, start + height) for start in range(0, base.shape[0], height)]


def _through(chain: Sequence[Array], block: Array) -> Array:
    """F_0 (F_1 (… (F_{m-1} X)))."""
    for factor in reversed(chain):
        block = factor @ block
    return block
