"""How much of a step of delta is the sum of the factors' own steps, and how much is their interaction."""

from __future__ import annotations

import numpy as np

from linchain_analysis.measures.cores import Cores, cosine, first_order_terms, inner_product, norm, ratio
from linchain_analysis.measures.registry import Values, measure
from linchain_analysis.measures.spectral import Array
from linchain_analysis.vocabulary import Column


def order_terms(cores: Cores) -> list[Array]:
    """Return the m terms of a step by order, each (k, p, q), scale included: their sum is the update of delta.

    Term j collects the products in which j factors stand with their update and the others as they were before: the
    coefficient of ε^j in ∏(F_i + ε dF_i), by the recursion C_j ← C_j F + C_{j-1} dF.
    """
    coefficients = [cores.before[0], cores.change[0]]
    for factor, change in zip(cores.before[1:], cores.change[1:], strict=True):
        longer = [term @ factor for term in coefficients] + [np.zeros(())]
        for order, term in enumerate(coefficients):
            longer[order + 1] = longer[order + 1] + term @ change
        coefficients = longer
    return [cores.scale[:, None, None] * term for term in coefficients[1:]]


@measure(
    Column(
        "modules",
        "order_ratios",
        "values",
        "1",
        "‖C_j‖/‖dΔW‖ for j = 1 … n + 2, C_j the part of the update of delta in which j factors stand with their "
        "update; their sum is the update, their ratios need not sum to 1; NaN where the update is 0",
        "",
        basis="update",
    ),
    Column(
        "modules",
        "first_order_share",
        "float",
        "1",
        "⟨C_1, dΔW⟩/‖dΔW‖²: share of the update of delta that is linear in the factors' updates; the shares of all "
        "orders sum to 1, and one may be negative; NaN where the update is 0",
        "",
        basis="update",
    ),
    Column(
        "modules",
        "interaction_ratio",
        "float",
        "1",
        "‖dΔW − C_1‖/‖dΔW‖: size of all higher orders together; NaN where the update is 0",
        "",
        basis="update",
    ),
    Column(
        "modules",
        "first_order_cosine",
        "float",
        "1",
        "cosine of C_1 with the update of delta; NaN where either is 0",
        "",
        basis="update",
    ),
    Column(
        "factors",
        "own_share",
        "float",
        "1",
        "⟨L_i dF_i R_i, dΔW⟩/‖dΔW‖²: share of the update of delta that is this factor's own first-order part; NaN "
        "where the update is 0",
        "",
        basis="update",
    ),
    Column(
        "factors",
        "own_cosine",
        "float",
        "1",
        "cosine of L_i dF_i R_i with the update of delta; NaN where either is 0",
        "",
        basis="update",
    ),
)
def measure_orders(cores: Cores) -> Values:
    """Decompose the update of delta by the number of factors that stand with their update."""
    terms = order_terms(cores)
    update = cores.update
    size = norm(update)
    scale = cores.scale[:, None, None]
    own = [scale * term for term in first_order_terms(cores.before, cores.change)]
    higher = sum(terms[1:], np.zeros_like(update))
    return {
        "order_ratios": np.stack([ratio(norm(term), size) for term in terms], axis=-1),
        "first_order_share": _share(terms[0], update),
        "interaction_ratio": ratio(norm(higher), size),
        "first_order_cosine": cosine(terms[0], update),
        "own_share": np.stack([_share(term, update) for term in own], axis=-1),
        "own_cosine": np.stack([cosine(term, update) for term in own], axis=-1),
    }


def _share(part: Array, whole: Array) -> Array:
    """⟨part, whole⟩/‖whole‖²; NaN where whole is 0."""
    size = norm(whole)
    unit = whole / np.where(size > 0, size, np.nan)[:, None, None]
    return ratio(inner_product(part, unit), size)
