"""How much of the gradient of the full weight a chain can follow.

With G = ∂L/∂W (d_in, d_out) of one backward pass, T the space of first-order changes of the chain
{Σ L_i D_i R_i}, the sum over the factors that train, and Π_T the orthogonal projection on it. Where all train and have
full rank, with U an orthonormal basis of the columns of L_{m-1} and V one of the rows of R_0,
Π_T G = UUᵀG + GVVᵀ − UUᵀGVVᵀ.
"""

from __future__ import annotations

import numpy as np

from linchain_analysis.measures.cores import Cores, ratio
from linchain_analysis.measures.registry import Values, measure
from linchain_analysis.vocabulary import Column

_MOMENT = "during the last backward pass before a sampled step, before the step"


@measure(
    Column(
        "modules",
        "gradient_capture",
        "float",
        "1",
        "‖Π_T G‖/‖G‖ in 0 … 1: share of the full-weight gradient of one backward pass along which the chain can move "
        "at all, whatever the optimiser; NaN where G is 0 or the layer's tokens are not seen",
        _MOMENT,
        basis="tokens",
    ),
    Column(
        "modules",
        "gradient_preconditioned_cosine",
        "float",
        "1",
        "cos(G, P(G)), P the effective preconditioner; NaN where either is 0",
        _MOMENT,
        gauge_dependent=True,
        source="Arora, Cohen & Hazan 2018, On the optimization of deep networks (arXiv 1802.06509)",
        basis="tokens",
    ),
    Column(
        "modules",
        "full_grad_norm",
        "float",
        "nats/weight",
        "‖G‖ of one backward pass, as if the whole weight trained",
        _MOMENT,
        basis="tokens",
    ),
    needs=["tokens"],
    sampled=True,
)
def measure_gradient_capture(cores: Cores) -> Values:
    """Compare the full-weight gradient with what the chain can follow of it and with what it does follow."""
    unknown = np.full(len(cores), np.nan)
    tokens = cores.tokens
    if tokens is None:
        return {
            "gradient_capture": unknown,
            "gradient_preconditioned_cosine": unknown,
            "full_grad_norm": unknown,
        }
    size = np.sqrt(tokens.gradient_square)
    return {
        "gradient_capture": ratio(np.sqrt(tokens.tangent_square), size),
        "gradient_preconditioned_cosine": ratio(
            tokens.preconditioned_dot, size * np.sqrt(tokens.preconditioned_square)
        ),
        "full_grad_norm": size,
    }
