"""Further ranks and norms of delta, computed from its stored spectrum when they are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.measures.registry import spectral_measure
from linchain_analysis.measures.spectral import (
    Array,
    count_above,
    effective_rank_squared,
    frobenius_norm,
    num_directions,
    spectral_norm,
    stable_rank,
)

_ROY = "Roy & Vetterli 2007, The effective rank: a measure of effective dimensionality, EUSIPCO"
_FIXED_CUT_OFF = 1e-3

spectral_measure(
    "exp of the entropy of σ², p_i = σ_i²/Σσ²: the effective rank with less weight on the tail; NaN for delta = 0",
    formula_source=_ROY,
)(effective_rank_squared)
spectral_measure("number of leading directions that hold 90 % of Σσ²; NaN for delta = 0")(num_directions)


@spectral_measure("(Σσ²)²/Σσ⁴: participation ratio of σ²; NaN for delta = 0")
def participation_ratio(sigma: NDArray[Any]) -> Array:
    """Return (Σσ²)²/Σσ⁴, in 1 … r; NaN for sigma = 0."""
    sigma = np.asarray(sigma, dtype=np.float64)
    top = spectral_norm(sigma)
    squares = (sigma / np.where(top > 0, top, np.nan)[..., None]) ** 2
    total = squares.sum(axis=-1)
    return np.asarray(total**2 / np.where(total > 0, (squares**2).sum(axis=-1), np.nan))


@spectral_measure("number of σ_i above 1e-3 σ₁; 0 for delta = 0")
def numerical_rank_fixed(sigma: NDArray[Any]) -> Array:
    """Return the number of singular values above 1e-3 of the largest."""
    return count_above(sigma, _FIXED_CUT_OFF)


@spectral_measure("nuclear norm Σσ; 0 for delta = 0", unit="weight")
def delta_nuclear_norm(sigma: NDArray[Any]) -> Array:
    """Return Σσ; NaN where sigma is not finite."""
    total = np.asarray(np.sum(np.asarray(sigma, dtype=np.float64), axis=-1))
    return np.where(np.isfinite(total), total, np.nan)


@spectral_measure("Σσ/√Σσ² squared: ratio of nuclear to Frobenius norm, squared, in 1 … r; NaN for delta = 0")
def nuclear_rank(sigma: NDArray[Any]) -> Array:
    """Return (Σσ)²/Σσ², in 1 … r; NaN for sigma = 0."""
    total, size = delta_nuclear_norm(sigma), frobenius_norm(sigma)
    return np.asarray((total / np.where(size > 0, size, np.nan)) ** 2)


# The same of the update of delta, from its own spectrum.
for _name, _formula, _meaning, _unit in (
    ("stable_rank", stable_rank, "Σσ²/σ₁² of the update of delta; NaN where it is 0", "directions"),
    ("participation_ratio", participation_ratio, "(Σσ²)²/Σσ⁴ of the update of delta; NaN where it is 0", "directions"),
    ("num_directions", num_directions, "leading directions that hold 90 % of Σσ² of the update of delta", "directions"),
    ("spectral_norm", spectral_norm, "σ₁ of the update of delta; 0 where it is 0", "weight"),
    ("nuclear_norm", delta_nuclear_norm, "nuclear norm Σσ of the update of delta; 0 where it is 0", "weight"),
):
    spectral_measure(_meaning, unit=_unit, name=f"delta_update_{_name}", spectrum="delta_update_spectrum")(_formula)
