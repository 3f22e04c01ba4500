"""What the inputs of a map show of the gradient of the full weight; the rows of its design are the tokens.

Without a design the loss is an expectation over all inputs, and the root of their covariance C takes the place of
X/√N, its limit for many inputs N: ΔW is seen as C^½ ΔW, that is as by one token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.measures.cores import TokenParts, first_order_terms, prefixes, suffixes
from linchain_analysis.measures.theory.gradients import multiply_chain
from linchain_analysis.problems.synthetic import LinearMaps

Floats = NDArray[np.float64]


def look_at_inputs(
    problem: LinearMaps,
    index: NDArray[np.intp],
    factors: Sequence[Floats],
    gradients: Sequence[Floats],
    scale: float,
    trained: Sequence[bool],
) -> TokenParts:
    """Return what the inputs of one step show of each chain.

    Args:
        problem: The maps as this step sees them (`LinearMaps.at_step`).
        index: (k,), the map of each chain.
        factors: The factors before the step.
        gradients: Their gradients, scale · L_iᵀ G R_iᵀ.
        scale: What multiplies the product.
        trained: (m,), which factors train: the tangent space and P are those of these alone.
    """
    gradient = problem.evaluate(scale * multiply_chain(factors), index)[1]
    kept = [g if train else np.zeros_like(g) for g, train in zip(gradients, trained, strict=True)]
    preconditioned = sum(first_order_terms(factors, kept), np.zeros(())) / scale
    seen = _inputs(problem, index, factors[0])
    return TokenParts(
        gradient_square=_square(gradient),
        tangent_square=_tangent_square(gradient, factors, trained),
        preconditioned_dot=np.asarray(sum((_square(g) for g in kept), np.zeros(()))) / scale**2,
        preconditioned_square=_square(preconditioned),
        num_tokens=np.full(len(index), 1.0 if problem.design is None else float(problem.design.shape[1])),
        inputs=seen,
    )


def _inputs(problem: LinearMaps, index: NDArray[np.intp], first: Floats) -> Floats:
    """R (k, w_0, w_0) of X A, or of C^½ A."""
    if problem.design is not None:
        seen = problem.design[index] @ first
    else:
        seen = first * np.sqrt(problem.covariance)[:, None] if len(problem.covariance) else first
    triangle = np.asarray(np.linalg.qr(seen, mode="r"))
    missing = first.shape[2] - triangle.shape[1]  # fewer inputs than columns
    return np.asarray(np.pad(triangle, ((0, 0), (0, missing), (0, 0))))


def _tangent_square(gradient: Floats, factors: Sequence[Floats], trained: Sequence[bool]) -> Floats:
    """Return ‖Π_T G‖² (k,), T the span of {L_i D R_i} over the factors that train.

    From factor to factor the columns of L_i can only become fewer and the rows of R_i more, so T is an orthogonal sum;
    with U_i, V_i bases of both, ‖Π_T G‖² = Σ ‖U_iᵀ G V_i‖² − ‖U_iᵀ G V_{i'}‖², i' the trained factor before.
    """
    total = np.zeros(len(gradient))
    known: Floats | None = None  # V of the trained factor before
    for left, right, train in zip(prefixes(factors), suffixes(factors), trained, strict=True):
        if not train:
            continue
        columns = gradient if left is None else _basis(left).swapaxes(1, 2) @ gradient
        rows = None if right is None else _basis(right.swapaxes(1, 2))
        total += _square(columns if rows is None else columns @ rows)
        if known is not None:
            total -= _square(columns @ known)
        known = rows
    return np.maximum(total, 0.0)


def _basis(matrix: Floats) -> Floats:
    """Orthonormal basis (k, d, w) of the columns of (k, d, w), zero columns for directions at rounding level."""
    finite = np.isfinite(matrix).all(axis=(1, 2), keepdims=True)
    u, sigma, _ = np.linalg.svd(np.where(finite, matrix, 0.0), full_matrices=False)
    cut_off = max(matrix.shape[1:]) * np.finfo(np.float64).eps * sigma.max(axis=-1, keepdims=True)
    return np.where(finite, u * (sigma > cut_off)[:, None, :], np.nan)


def _square(matrix: Floats) -> Floats:
    return np.asarray(np.einsum("kij,kij->k", matrix, matrix))
