"""Ranks and norms of a matrix from its singular values.

Legend: sigma (..., r) singular values, descending, padded with zeros on the right where spectra of different
lengths share an array. Zeros change none of these measures. Where sigma is all zero a rank is undefined (NaN) and a
norm is 0; where it holds NaN or Inf the result is NaN, because no number would be true.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def spectrum(core: NDArray[Any]) -> Array:
    """Return the singular values of each matrix of a stack.

    Args:
        core: (..., p, q), any real dtype.

    Returns:
        (..., min(p, q)) float64, descending; all NaN for a matrix that holds NaN or Inf, which LAPACK would refuse
        for the whole stack.
    """
    core = np.asarray(core, dtype=np.float64)
    if np.isfinite(core).all():
        return np.asarray(np.linalg.svd(core, compute_uv=False))
    finite = np.isfinite(core).all(axis=(-2, -1))
    sigma: Array = np.linalg.svd(np.where(finite[..., None, None], core, 0.0), compute_uv=False)
    sigma[~finite] = np.nan
    return sigma


def effective_rank(sigma: NDArray[Any]) -> Array:
    """Return exp(−Σ p_i ln p_i) with p_i = σ_i/Σσ, in 1 … r (Roy & Vetterli 2007, Definition 1)."""
    return np.exp(_entropy(_relative(sigma)))


def effective_rank_squared(sigma: NDArray[Any]) -> Array:
    """Return the effective rank of σ² in place of σ, which weighs the tail less: p_i = σ_i²/Σσ²."""
    return np.exp(_entropy(_relative(sigma) ** 2))


def stable_rank(sigma: NDArray[Any]) -> Array:
    """Return Σσ²/σ₁², in 1 … r (Rudelson & Vershynin 2007)."""
    return np.asarray(np.sum(_relative(sigma) ** 2, axis=-1))


def frobenius_norm(sigma: NDArray[Any]) -> Array:
    """Return √Σσ² (or that of any numbers), without overflow or underflow on the way."""
    sigma = np.abs(np.asarray(sigma, dtype=np.float64))
    if sigma.shape[-1] == 0:
        return np.zeros(sigma.shape[:-1])
    top = sigma.max(axis=-1)  # NaN where any is NaN
    ratio = np.sqrt(np.sum(_relative(sigma) ** 2, axis=-1))
    with np.errstate(invalid="ignore"):
        norm = np.where(top == 0, 0.0, top * ratio)
    return np.asarray(norm)


def spectral_norm(sigma: NDArray[Any]) -> Array:
    """Return σ₁; NaN where sigma holds NaN or Inf."""
    sigma = np.asarray(sigma, dtype=np.float64)
    if sigma.shape[-1] == 0:
        return np.zeros(sigma.shape[:-1])
    top = sigma.max(axis=-1)
    return np.asarray(np.where(np.isfinite(top), top, np.nan))


def num_directions(sigma: NDArray[Any], share: float = 0.9) -> Array:
    """Return how many leading directions hold `share` of Σσ²; NaN for sigma = 0.

    Args:
        sigma: (..., r) singular values, descending.
        share: In (0, 1].
    """
    squares = _relative(sigma) ** 2
    total = squares.sum(axis=-1, keepdims=True)
    reached = np.cumsum(squares, axis=-1) >= share * total * (1 - 1e-12)  # 1e-12: the rounding of the sums
    count = np.argmax(reached, axis=-1) + 1.0
    return np.asarray(np.where(np.isfinite(total[..., 0]), count, np.nan))


def condition_number(sigma: NDArray[Any]) -> Array:
    """Return σ₁/σ_r over all r given values: Inf where σ_r is 0, NaN where all are."""
    relative = _relative(sigma)
    with np.errstate(divide="ignore"):
        return np.asarray(1.0 / relative.min(axis=-1))


def count_above(sigma: NDArray[Any], cut_off: float) -> Array:
    """Return how many singular values exceed `cut_off` · σ₁; 0 for sigma = 0, NaN where sigma is not finite."""
    sigma = np.asarray(sigma, dtype=np.float64)
    if sigma.shape[-1] == 0:
        return np.zeros(sigma.shape[:-1])
    top = sigma.max(axis=-1, keepdims=True)
    count = np.sum((sigma > cut_off * top) & (sigma > 0), axis=-1, dtype=np.float64)
    return np.asarray(np.where(np.isfinite(top[..., 0]), count, np.nan))


def _relative(sigma: NDArray[Any]) -> Array:
    """σ/σ₁, so that squares neither overflow nor vanish; NaN where σ₁ is 0 or not finite."""
    sigma = np.asarray(sigma, dtype=np.float64)
    if sigma.shape[-1] == 0:
        return np.full((*sigma.shape[:-1], 1), np.nan)
    top = sigma.max(axis=-1, keepdims=True)
    usable = np.isfinite(top) & (top > 0)
    relative: Array = np.divide(sigma, top, out=np.full(sigma.shape, np.nan), where=usable)
    return relative


def _entropy(weights: Array) -> Array:
    """Shannon entropy in nats of weights (..., r) ≥ 0 made to sum to 1; 0 ln 0 = 0."""
    p = weights / weights.sum(axis=-1, keepdims=True)
    return np.asarray(-np.sum(p * np.log(p, out=np.zeros_like(p), where=(p > 0) | np.isnan(p)), axis=-1))
