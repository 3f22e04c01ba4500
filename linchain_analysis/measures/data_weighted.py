"""What delta does to the inputs it sees, not to isotropic ones."""

from __future__ import annotations

import numpy as np

from linchain_analysis.measures.cores import Cores, multiply
from linchain_analysis.measures.registry import Values, measure
from linchain_analysis.measures.spectral import effective_rank, spectrum
from linchain_analysis.vocabulary import Column

_MOMENT = "during the last forward pass before a sampled step"


@measure(
    Column(
        "modules",
        "data_weighted_spectrum",
        "spectrum",
        "weight · input",
        "singular values of X ΔW/√tokens, descending, X the layer's inputs in one forward pass, delta as that pass had "
        "it (with the scale of the step); NaN where the layer's tokens are not seen or delta is measured from factors "
        "whose product was not zero",
        _MOMENT,
        basis="tokens",
    ),
    Column(
        "modules",
        "data_weighted_effective_rank",
        "float",
        "directions",
        "effective rank of X ΔW; NaN where it is 0",
        _MOMENT,
        source="Roy & Vetterli 2007, The effective rank: a measure of effective dimensionality, EUSIPCO",
        basis="tokens",
    ),
    needs=["tokens"],
    sampled=True,
)
def measure_data_weighted(cores: Cores) -> Values:
    """Take the spectrum of delta as the layer's inputs see it."""
    length = min(cores.dims)
    sigma = np.full((len(cores), length), np.nan)
    if cores.tokens is not None and cores.since_start is None:
        count = np.where(cores.tokens.num_tokens > 0, cores.tokens.num_tokens, np.nan)
        seen = multiply((cores.tokens.inputs, *cores.before[1:])) * cores.scale[:, None, None]
        sigma = spectrum(seen / np.sqrt(count)[:, None, None])[:, :length]
    return {"data_weighted_spectrum": sigma, "data_weighted_effective_rank": effective_rank(sigma)}
