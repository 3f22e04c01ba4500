"""What one step of a chain can do to ΔW: its Jacobian, the rank of that, and the effective preconditioner.

Legend: as in `gradients`; dims = (d_in, w_0, …, w_n, d_out), so that factor i has dims[i] rows and dims[i + 1]
columns. Everything here is dense, for maps small enough to look at; `measures.preconditioner` has the spectrum of P for
any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.measures.cores import first_order_terms, prefixes, suffixes
from linchain_analysis.measures.spectral import Array
from linchain_analysis.measures.theory.gradients import factor_gradients


def preconditioned_gradient(
    factors: Sequence[Array], gradient: Array, trained: Sequence[bool] | NDArray[np.bool_] | None = None
) -> Array:
    """Return P(G) = Σ L_i L_iᵀ G R_iᵀ R_i, (…, d_in, d_out).

    To first order, gradient descent on the factors moves ΔW by −lr · scale² · P(G) and not by −lr · G (Arora, Cohen &
    Hazan 2018, arXiv 1802.06509): one scale stands in every ∂L/∂F_i, the other before the product.

    Args:
        factors: A, W1, …, Wn, B.
        gradient: G.
        trained: Which factors train, all by default: the others have no term.
    """
    terms = first_order_terms(factors, factor_gradients(factors, gradient))
    chosen = [True] * len(terms) if trained is None else trained
    return sum((term for term, trains in zip(terms, chosen, strict=True) if trains), np.zeros_like(gradient))


def jacobian(factors: Sequence[Array]) -> Array:
    """Return the matrix (d_in · d_out, parameters) that takes the factors' changes to that of A W1 … Wn B.

    Rows and columns go through matrices row by row; its columns stand in the order of the factors. J Jᵀ is P.

    Args:
        factors: Of one chain.
    """
    d_in, d_out = len(factors[0]), factors[-1].shape[1]
    blocks = []
    for left, right in zip(prefixes(factors), suffixes(factors), strict=True):
        before = np.eye(d_in) if left is None else left
        after = np.eye(d_out) if right is None else right
        blocks.append(np.kron(before, after.T))  # vec(L D R) = (L ⊗ Rᵀ) vec(D), row by row
    return np.hstack(blocks)


def measure_tangent_rank(factors: Sequence[Array]) -> int:
    """Return the number of directions in which ΔW can move to first order: the numerical rank of the Jacobian.

    Of the Jacobian and not of P = J Jᵀ, which would square its condition number.
    """
    return int(np.linalg.matrix_rank(jacobian(factors)))


def tangent_rank(dims: Sequence[int]) -> int:
    """Return ρ (d_in + d_out − ρ), ρ the smallest of `dims`: the rank of the Jacobian where all factors have full rank.

    It is the dimension of the matrices of rank ρ, whatever the number of factors. Widths above d_in or d_out add
    nothing: with ρ = min(d_in, d_out) it is d_in · d_out.
    """
    rank = min(dims)
    return rank * (dims[0] + dims[-1] - rank)


def first_step_rank(dims: Sequence[int]) -> int:
    """Return the rank of the Jacobian at B = 0, min(d_in, w_0, …, w_n) · d_out: B moves ΔW, and no other factor does.

    With no width above d_in it is r · d_out of square chains, whatever their length.
    """
    return min(dims[:-1]) * dims[-1]


def count_parameters(dims: Sequence[int]) -> int:
    """Return d_in w_0 + Σ w_{i-1} w_i + w_n d_out: Eq. 12 of the paper for widths of any kind."""
    return sum(rows * columns for rows, columns in pairwise(dims))


def gauge_dimension(dims: Sequence[int]) -> int:
    """Return the number of directions of parameter space that leave ΔW where it is, at factors of full rank.

    Parameters less `tangent_rank`: (n + 1) r² for square chains, those of W_i → W_i M, W_{i+1} → M⁻¹ W_{i+1} at each of
    n + 1 joints. Where widths differ it is another number than Σ w_i²: some M move no factor, and parameters that
    a narrower width cuts off from ΔW count as well.
    """
    return count_parameters(dims) - tangent_rank(dims)


def draw_generic_factors(dims: Sequence[int], generator: np.random.Generator) -> list[Array]:
    """Return Gaussian factors of unit gain, which have full rank with probability 1."""
    return [generator.standard_normal(shape) / np.sqrt(min(shape)) for shape in pairwise(dims)]
