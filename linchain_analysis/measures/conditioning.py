"""Conditioning of each factor and of the products on both sides of it."""

from __future__ import annotations

import numpy as np

from linchain_analysis.measures.cores import Cores, multiply, prefixes, suffixes
from linchain_analysis.measures.registry import Values, measure
from linchain_analysis.measures.spectral import Array, condition_number, spectrum
from linchain_analysis.vocabulary import Column


@measure(
    Column(
        "factors",
        "condition",
        "float",
        "1",
        "σ₁/σ_min of F_i over its min(rows, columns) singular values; where it is rank-deficient Inf or, by rounding, "
        "beyond 1e15; NaN for 0",
        "",
        gauge_dependent=True,
    ),
    Column(
        "factors",
        "prefix_condition",
        "float",
        "1",
        "σ₁/σ_min of L_i = F_0 … F_{i-1} over its narrowest width; 1 for the first factor, where L is the identity",
        "",
        gauge_dependent=True,
    ),
    Column(
        "factors",
        "suffix_condition",
        "float",
        "1",
        "σ₁/σ_min of R_i = F_{i+1} … F_{m-1} over its narrowest width; 1 for the last factor, where R is the identity",
        "",
        gauge_dependent=True,
    ),
    Column(
        "modules",
        "chain_condition",
        "float",
        "1",
        "σ₁/σ_min of the whole product A W1 … Wn B over its narrowest width; where it is rank-deficient Inf or, by "
        "rounding, beyond 1e15; NaN for 0",
        "",
    ),
)
def measure_conditioning(cores: Cores) -> Values:
    """Take condition numbers of factors, of the products before and behind them, and of the chain."""
    factors = cores.after
    # F_i has dims[i] rows and dims[i + 1] columns in the full chain.
    dims = [cores.size[0], *(factor.shape[2] for factor in factors[:-1]), cores.size[1]]
    one = np.ones(len(cores))
    lefts, rights = prefixes(factors), suffixes(factors)
    return {
        "condition": np.stack([_condition(f, min(dims[i : i + 2])) for i, f in enumerate(factors)], axis=-1),
        "prefix_condition": np.stack(
            [one if left is None else _condition(left, min(dims[: i + 1])) for i, left in enumerate(lefts)], axis=-1
        ),
        "suffix_condition": np.stack(
            [one if right is None else _condition(right, min(dims[i + 1 :])) for i, right in enumerate(rights)], axis=-1
        ),
        "chain_condition": _condition(multiply(factors), min(dims)),
    }


def _condition(matrix: Array, width: int) -> Array:
    return condition_number(spectrum(matrix)[..., :width])
