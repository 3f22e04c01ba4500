"""The effective preconditioner: what a chain makes of the gradient of the full weight.

Gradient descent on the factors moves delta, to first order, by −lr · scale² · P(G) with G = ∂L/∂ΔW and
P(G) = Σ L_i L_iᵀ G R_iᵀ R_i, the sum over the factors that train (Arora, Cohen & Hazan 2018, arXiv 1802.06509).
P is linear, symmetric and positive semidefinite on matrices (d_in, d_out).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.measures.cores import (
    Cores,
    cosine,
    first_order_terms,
    norm,
    prefixes,
    suffixes,
    trained_gradients,
)
from linchain_analysis.measures.registry import Values, measure
from linchain_analysis.measures.spectral import Array
from linchain_analysis.vocabulary import Column

_ARORA = "Arora, Cohen & Hazan 2018, On the optimization of deep networks (arXiv 1802.06509)"
_CUT_OFF = 1e-12  # of the largest eigenvalue: below it an eigenvalue of a float64 matrix of this size is rounding
_LARGEST_BLOCK = 600  # rows of the dense block, r² for square chains: 20 ms a module there, growing as r⁶


@measure(
    Column(
        "modules",
        "preconditioned_cosine",
        "float",
        "1",
        "−cos(dΔW, P(G)), with scale² P(G) = Σ L_i g_i R_i · scale from the factors' gradients before clipping: 1 "
        "where the update is what gradient descent with one learning rate does to first order; NaN where either is 0",
        "",
        gauge_dependent=True,
        source=_ARORA,
        basis="gradient and update",
    ),
    Column(
        "modules",
        "preconditioned_share",
        "float",
        "1",
        "cos²(dΔW, P(G)): share of ‖dΔW‖² that the best multiple of P(G) explains; NaN where either is 0",
        "",
        gauge_dependent=True,
        source=_ARORA,
        basis="gradient and update",
    ),
    needs=["gradients"],
)
def measure_preconditioned_step(cores: Cores) -> Values:
    """Compare the update of delta with the preconditioned gradient of the full weight."""
    unknown = np.full(len(cores), np.nan)
    gradients = trained_gradients(cores)
    if gradients is None:
        return {"preconditioned_cosine": unknown, "preconditioned_share": unknown}
    direction = cores.scale[:, None, None] * sum(first_order_terms(cores.before, gradients), np.zeros(()))
    angle = -cosine(cores.update, direction)
    return {"preconditioned_cosine": angle, "preconditioned_share": angle**2}


@measure(
    Column(
        "modules",
        "preconditioner_largest",
        "float",
        "weight^(2n+2)",
        "largest eigenvalue of P at the factors after the step; as all of P, NaN for chains with inner factors whose "
        "rank A · rank B is above 600 (square ones of r > 24)",
        "",
        gauge_dependent=True,
        source=_ARORA,
    ),
    Column(
        "modules",
        "preconditioner_condition",
        "float",
        "1",
        "largest over smallest eigenvalue of P among those above 1e-12 of the largest, so at most 1e12: Gaussian "
        "chains of n ≥ 4 reach that; NaN for P = 0",
        "",
        gauge_dependent=True,
        source=_ARORA,
    ),
    Column(
        "modules",
        "preconditioner_rank",
        "float",
        "directions",
        "number of eigenvalues of P above 1e-12 of the largest: r (d_in + d_out − r) where all factors have full rank "
        "and no eigenvalue falls below that",
        "",
        source=_ARORA,
    ),
    Column(
        "modules",
        "preconditioner_effective_rank",
        "float",
        "directions",
        "exp of the entropy of P's eigenvalues, normalised to sum 1; NaN for P = 0",
        "",
        gauge_dependent=True,
        source=_ARORA,
    ),
    sampled=True,
)
def measure_preconditioner(cores: Cores) -> Values:
    """Take the exact spectrum of the effective preconditioner."""
    names = ("largest", "condition", "rank", "effective_rank")
    found = np.full((len(cores), 4), np.nan)
    for j in range(len(cores)):
        factors = [factor[j] for factor in cores.after]
        if all(np.isfinite(factor).all() for factor in factors):
            # P has degree 2 (m - 1) in the factors; brought to size 1 they neither overflow nor vanish on the way.
            unit = _typical_size(factors)
            trained = None if cores.trained is None else cores.trained[j]
            values, counts = preconditioner_spectrum([factor / unit for factor in factors], cores.size, trained)
            found[j] = _summarise(values, counts)
            found[j, 0] *= np.float64(unit) ** (2 * (len(factors) - 1))
    found[np.isinf(found)] = np.nan
    return {f"preconditioner_{name}": found[:, i] for i, name in enumerate(names)}


def preconditioner_spectrum(
    factors: list[Array], size: tuple[int, int], trained: Sequence[bool] | NDArray[np.bool_] | None = None
) -> tuple[Array, Array]:
    """Return the eigenvalues of P that are not zero by construction, and how often each occurs.

    In bases of the column space of A and the row space of B, P falls into blocks: on their product Σ L_iL_iᵀ ⊗ R_iᵀR_i;
    outside the column space of A only the first term, I ⊗ R_0ᵀR_0, remains, d_in − rank A times; outside the row space
    of B only the last, L_{m-1}L_{m-1}ᵀ ⊗ I, d_out − rank B times; outside both P is zero.

    Args:
        factors: A~ (p, w_0), W_i, B~ (w_n, q) of one chain in small coordinates (or in full ones).
        size: d_in and d_out of the full chain.
        trained: Which factors train, all by default: the others have no term in P.

    Returns:
        Eigenvalues, unordered, and their multiplicities, both NaN where the block is too large to decompose
        or overflows.
    """
    left_basis = _column_basis(factors[0])  # (p, a)
    right_basis = _column_basis(factors[-1].T)  # (q, b)
    a, b = left_basis.shape[1], right_basis.shape[1]
    first, last = left_basis.T @ factors[0], factors[-1] @ right_basis
    small = [first[None], *(factor[None] for factor in factors[1:-1]), last[None]]
    lefts = [np.eye(a) if left is None else left[0] for left in prefixes(small)]
    rights = [np.eye(b) if right is None else right[0] for right in suffixes(small)]
    unknown = np.full(1, np.nan), np.full(1, np.nan)
    left_squares = [left @ left.T for left in lefts]
    right_squares = [right.T @ right for right in rights]
    for i, trains in enumerate([True] * len(factors) if trained is None else trained):
        if not trains:
            left_squares[i], right_squares[i] = 0.0 * left_squares[i], 0.0 * right_squares[i]
    if not all(np.isfinite(square).all() for square in (*left_squares, *right_squares)):
        return unknown
    if len(factors) == 2:  # I ⊗ BᵀB + AAᵀ ⊗ I: sums of the eigenvalues of both
        block = np.add.outer(np.linalg.eigvalsh(left_squares[1]), np.linalg.eigvalsh(right_squares[0])).ravel()
    elif a * b > _LARGEST_BLOCK:
        return unknown
    else:
        total = np.zeros((a, b, a, b))
        for left, right in zip(left_squares, right_squares, strict=True):
            total += left[:, None, :, None] * right[None, :, None, :]
        if not np.isfinite(total).all():
            return unknown
        block = np.linalg.eigvalsh(total.reshape(a * b, a * b))
    outside_left, outside_right = np.linalg.eigvalsh(right_squares[0]), np.linalg.eigvalsh(left_squares[-1])
    values = np.concatenate([block, outside_left, outside_right])
    counts = np.concatenate([np.ones(a * b), np.full(b, float(size[0] - a)), np.full(a, float(size[1] - b))])
    return values, counts


def _typical_size(factors: list[Array]) -> float:
    """Geometric mean of the norms of the factors that are not zero; 1 where all are."""
    sizes = np.array([norm(factor) for factor in factors])
    usable = sizes[(sizes > 0) & np.isfinite(sizes)]
    return float(np.exp(np.log(usable).mean())) if len(usable) else 1.0


def _column_basis(matrix: Array) -> Array:
    """Orthonormal basis (p, rank) of the columns of a matrix (p, w); the rank has the cut-off of `matrix_rank`."""
    if not matrix.any():
        return np.zeros((len(matrix), 0))
    u, sigma, _ = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(u[:, sigma > max(matrix.shape) * np.finfo(np.float64).eps * sigma[0]])


def _summarise(values: Array, counts: Array) -> tuple[float, float, float, float]:
    top = values.max(initial=0.0)
    kept = (values > _CUT_OFF * top) & (counts > 0)
    if np.isnan(values).any():
        return (np.nan,) * 4
    if not kept.any():
        return 0.0, np.nan, 0.0, np.nan
    values, counts = values[kept], counts[kept]
    share = values / (values * counts).sum()
    return top, top / values.min(), counts.sum(), float(np.exp(-np.sum(counts * share * np.log(share))))
