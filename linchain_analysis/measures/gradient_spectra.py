"""Singular values of each factor's gradient."""

from __future__ import annotations

import numpy as np

from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.registry import Values, measure
from linchain_analysis.measures.spectral import effective_rank, spectrum
from linchain_analysis.vocabulary import Column


@measure(
    Column(
        "factors",
        "grad_spectrum",
        "spectrum",
        "nats/weight",
        "singular values of g_i, descending; padded with zeros to the longest of the module's factors; NaN without a "
        "gradient",
        "before clipping",
        gauge_dependent=True,
        basis="gradient",
    ),
    Column(
        "factors",
        "grad_effective_rank",
        "float",
        "directions",
        "effective rank of g_i; NaN where it is 0",
        "before clipping",
        gauge_dependent=True,
        source="Roy & Vetterli 2007, The effective rank: a measure of effective dimensionality, EUSIPCO",
        basis="gradient",
    ),
    needs=["gradients"],
)
def measure_gradient_spectra(cores: Cores) -> Values:
    """Take the singular values and the effective rank of each factor's gradient."""
    dims = cores.dims
    longest = max(min(dims[i : i + 2]) for i in range(cores.num_factors))
    found = np.full((len(cores), cores.num_factors, longest), np.nan)
    for i, gradient in enumerate(cores.gradient or ()):
        sigma = spectrum(gradient)[:, : min(dims[i : i + 2])]
        found[:, i] = np.pad(sigma, ((0, 0), (0, longest - sigma.shape[1])))
        found[:, i][np.isnan(sigma).any(axis=1)] = np.nan
    return {"grad_spectrum": found, "grad_effective_rank": effective_rank(found)}
