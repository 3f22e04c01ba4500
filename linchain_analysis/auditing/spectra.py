"""Spectrum and singular vectors of a saved delta from its factors, in float64, never as a dense matrix.

With A = Q_a R_a and Bᵀ = Q_b R_b (thin QR), s A W1 … Wn B = Q_a (s R_a W1 … Wn R_bᵀ) Q_bᵀ: the core in brackets has the
singular values of delta, and its singular vectors times Q_a, Q_b are those of delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.spectral import Array, count_above


@dataclass(frozen=True)
class Decomposition:
    """The product s A W1 … Wn B of one matrix, taken apart.

    Attributes:
        cores: The chain in small coordinates, k = 1, at rest: no step, no gradient.
        left: Q_a (d_in, p), orthonormal columns.
        right: Q_b (d_out, q), orthonormal columns.
        rank_bound: The smallest of all widths of the chain.
    """

    cores: Cores
    left: Array
    right: Array
    rank_bound: int

    @property
    def is_finite(self) -> bool:
        """Whether every factor holds numbers only."""
        return bool(np.isfinite(self.cores.delta).all())

    @cached_property
    def _svd(self) -> tuple[Array, Array, Array]:
        u, sigma, vh = np.linalg.svd(self.cores.delta[0])
        return u[:, : self.rank_bound], sigma[: self.rank_bound], vh[: self.rank_bound].T

    @property
    def sigma(self) -> Array:
        """Singular values (rank_bound,), descending; NaN where a factor is not finite."""
        return self._svd[1] if self.is_finite else np.full(self.rank_bound, np.nan)

    @property
    def cut_off(self) -> float:
        """Below this share of σ₁ a singular value is rounding of the stored factors: max(d_in, d_out) · ε."""
        return max(self.cores.size) * self.cores.epsilon

    @property
    def rank(self) -> int:
        """Number of singular values above the cut-off; 0 where a factor is not finite."""
        return int(count_above(self.sigma, self.cut_off)) if self.is_finite else 0

    def vectors(self) -> tuple[Array, Array]:
        """Return the left (d_in, rank) and right (d_out, rank) singular vectors above the cut-off, σ descending."""
        if not self.is_finite:
            return np.zeros((self.cores.size[0], 0)), np.zeros((self.cores.size[1], 0))
        u, _, v = self._svd
        return self.left @ u[:, : self.rank], self.right @ v[:, : self.rank]


def decompose(factors: Sequence[Array], scale: float, epsilon: float) -> Decomposition:
    """Take a chain apart.

    Args:
        factors: A (d_in, w_0), W1 … Wn and B (w_n, d_out), float64.
        scale: What multiplies their product.
        epsilon: Machine epsilon of the dtype they are stored in.
    """
    first, *inner, last = factors
    size = first.shape[0], last.shape[1]
    bound = min(min(factor.shape) for factor in factors)
    if not all(np.isfinite(factor).all() for factor in factors):
        left, right = np.zeros((size[0], 1)), np.zeros((size[1], 1))
        small: tuple[Array, ...] = (np.full((1, 1, 1), np.nan), np.full((1, 1, 1), np.nan))
    else:
        left, upper_first = np.linalg.qr(first)
        right, upper_last = np.linalg.qr(last.T)
        small = tuple(factor[None] for factor in (upper_first, *inner, upper_last.T))
    cores = Cores(
        scale=np.array([scale]),
        before=small,
        change=tuple(np.zeros_like(factor) for factor in small),
        size=size,
        epsilon=epsilon,
    )
    return Decomposition(cores, left, right, bound)
