"""Rank of delta and of its update beyond the rounding of their factors."""

from __future__ import annotations

import numpy as np

from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.registry import Values, measure
from linchain_analysis.measures.spectral import count_above, spectrum
from linchain_analysis.vocabulary import Column


@measure(
    Column(
        "modules",
        "numerical_rank",
        "float",
        "directions",
        "number of σ_i of delta above max(d_in, d_out) · ε · σ₁, ε the machine epsilon of the factors' dtype; 0 for "
        "delta = 0, NaN where max(d_in, d_out) · ε reaches 1 (bf16 above 127, fp16 above 1023): no σ_i could be above",
        "",
    ),
    Column(
        "modules",
        "delta_update_numerical_rank",
        "float",
        "directions",
        "the same of the update of delta: at most 2 r",
        "",
        basis="update",
    ),
)
def measure_numerical_rank(cores: Cores) -> Values:
    """Count the singular values of delta and of its update that stand above rounding."""
    cut_off = max(cores.size) * cores.epsilon
    if cut_off >= 1:  # not even σ₁ would count
        unknown = np.full(len(cores), np.nan)
        return {"numerical_rank": unknown, "delta_update_numerical_rank": unknown}
    return {
        "numerical_rank": count_above(spectrum(cores.delta), cut_off),
        "delta_update_numerical_rank": count_above(spectrum(cores.update), cut_off),
    }
