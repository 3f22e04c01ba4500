"""Whether a step is what gradient descent makes of the gradients that were recorded."""

from __future__ import annotations

import numpy as np

from linchain_analysis.measures.cores import Cores, first_order_terms, norm, ratio, trained_gradients
from linchain_analysis.measures.registry import Values, measure
from linchain_analysis.vocabulary import Column

_ARORA = "Arora, Cohen & Hazan 2018, On the optimization of deep networks (arXiv 1802.06509)"


@measure(
    Column(
        "modules",
        "sgd_identity_error",
        "float",
        "1",
        "‖C_1 + scale Σ η_i L_i g_i R_i‖/‖C_1‖, C_1 the part of the update of delta that is linear in the factors' "
        "updates; with one learning rate the sum is scale² η P(G). 0 for plain gradient descent up to the rounding of "
        "stored factors, about ε ‖F_i‖/‖dF_i‖; of order 1 for Adam; |clip_coef − 1|/clip_coef where gradients were "
        "clipped; NaN where C_1 is 0 or a learning rate is not known",
        "",
        gauge_dependent=True,
        source=_ARORA,
        basis="gradient and update",
    ),
    level="named",
    # "start" makes the tracker read the learning rate of each factor.
    needs=["gradients", "start"],
)
def measure_sgd_identity(cores: Cores) -> Values:
    """Compare the first-order part of the update of delta with that of a step of gradient descent."""
    gradients = trained_gradients(cores)
    if gradients is None or cores.learning_rate is None:
        return {"sgd_identity_error": np.full(len(cores), np.nan)}
    # A factor in no group of the optimiser has no rate and does not move. The sum of both parts is taken in each
    # factor, before the products: what is left of it keeps its digits.
    rates = [cores.learning_rate[:, i, None, None] for i in range(cores.num_factors)]
    left_over = [
        change + np.where(np.isnan(rate) & ~change.any(axis=(1, 2), keepdims=True), 0.0, rate) * gradient
        for change, rate, gradient in zip(cores.change, rates, gradients, strict=True)
    ]
    error = sum(first_order_terms(cores.before, left_over), np.zeros(()))
    step = sum(first_order_terms(cores.before, cores.change), np.zeros(()))
    return {"sgd_identity_error": ratio(norm(error), norm(step))}
