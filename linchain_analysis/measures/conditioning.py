"""Conditioning of each factor and of the products on both sides of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.measures.cores import Cores, multiply, prefixes, suffixes
from linchain_analysis.measures.registry import Values, measure
from linchain_analysis.measures.spectral import Array, condition_number, spectrum
from linchain_analysis.vocabulary import Column

# Of an outer factor: beyond it, coordinates from a Gram matrix in float64 (ε · condition² ≪ 1) hold no smallest σ.
_RESOLVED = 1e6


@measure(
    Column(
        "factors",
        "condition",
        "float",
        "1",
        "σ₁/σ_min of F_i over its min(rows, columns) singular values; Inf where it is rank-deficient (or, of an inner "
        "factor, beyond 1e15) and, of A and B, above 1e6, where a Gram matrix resolves it no more; NaN for 0",
        "",
        gauge_dependent=True,
    ),
    Column(
        "factors",
        "prefix_condition",
        "float",
        "1",
        "σ₁/σ_min of L_i = F_0 … F_{i-1} over its narrowest width; Inf above 1e6 where that of A is; 1 for the first "
        "factor, where L is the identity",
        "",
        gauge_dependent=True,
    ),
    Column(
        "factors",
        "suffix_condition",
        "float",
        "1",
        "σ₁/σ_min of R_i = F_{i+1} … F_{m-1} over its narrowest width; Inf above 1e6 where that of B is; 1 for the "
        "last factor, where R is the identity",
        "",
        gauge_dependent=True,
    ),
    Column(
        "modules",
        "chain_condition",
        "float",
        "1",
        "σ₁/σ_min of the whole product A W1 … Wn B over its narrowest width; Inf where it is rank-deficient (or "
        "beyond 1e15), and above 1e6 where that of A or of B is; NaN for 0",
        "",
    ),
)
def measure_conditioning(cores: Cores) -> Values:
    """Take condition numbers of factors, of the products before and behind them, and of the chain."""
    factors, dims = cores.after, cores.dims
    one = np.ones(len(cores))
    lefts, rights = prefixes(factors), suffixes(factors)
    own = [_condition(f, min(dims[i : i + 2])) for i, f in enumerate(factors)]
    first_lost, last_lost = own[0] > _RESOLVED, own[-1] > _RESOLVED
    own[0], own[-1] = _resolve(own[0], first_lost), _resolve(own[-1], last_lost)
    before = [
        one if left is None else _resolve(_condition(left, min(dims[: i + 1])), first_lost)
        for i, left in enumerate(lefts)
    ]
    behind = [
        one if right is None else _resolve(_condition(right, min(dims[i + 1 :])), last_lost)
        for i, right in enumerate(rights)
    ]
    return {
        "condition": np.stack(own, axis=-1),
        "prefix_condition": np.stack(before, axis=-1),
        "suffix_condition": np.stack(behind, axis=-1),
        "chain_condition": _resolve(_condition(multiply(factors), min(dims)), first_lost | last_lost),
    }


def _condition(matrix: Array, width: int) -> Array:
    return condition_number(spectrum(matrix)[..., :width])


def _resolve(condition: Array, lost: NDArray[np.bool_]) -> Array:
    """Inf in place of what the small coordinates of an outer factor have lost to rounding."""
    return np.where(lost & (condition > _RESOLVED), np.inf, condition)
