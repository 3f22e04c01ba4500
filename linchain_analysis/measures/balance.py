"""Balance of neighbouring factors, which gradient flow conserves and other training does not."""

from __future__ import annotations

import numpy as np

from linchain_analysis.measures.cores import Cores, norm, ratio
from linchain_analysis.measures.registry import Values, measure
from linchain_analysis.measures.spectral import Array
from linchain_analysis.vocabulary import Column, columns_of

_ARORA = "Arora, Cohen & Hazan 2018, On the optimization of deep networks (arXiv 1802.06509)"

_DRIFT = next(column for column in columns_of("links") if column.name == "balance_drift")


@measure(
    _DRIFT,
    Column(
        "links",
        "imbalance",
        "float",
        "1",
        "‖F_iᵀF_i − (η_i/η_{i+1}) F_{i+1}F_{i+1}ᵀ‖ / (‖F_iᵀF_i‖ + (η_i/η_{i+1}) ‖F_{i+1}F_{i+1}ᵀ‖), in 0 … 1; 0 for "
        "balanced factors, 1 where one of them is 0; NaN where both are",
        "",
        gauge_dependent=True,
        source=_ARORA,
    ),
    needs=["start"],
)
def measure_balance(cores: Cores) -> Values:
    """Compare F_iᵀF_i with F_{i+1}F_{i+1}ᵀ for each pair of neighbouring factors, now and when training began."""
    drift, imbalance = [], []
    for i, (weight_left, weight_right) in enumerate(_weights(cores)):
        left, right = squares(cores.after, i)
        left, right = weight_left * left, weight_right * right
        size = norm(left) + norm(right)
        imbalance.append(ratio(norm(left - right), size))
        if cores.start_squares:
            start_left, start_right = cores.start_squares[i]
            moved = (left - weight_left * start_left) - (right - weight_right * start_right)
            drift.append(ratio(norm(moved), size))
        else:
            drift.append(np.full(len(cores), np.nan))
    return {"balance_drift": np.stack(drift, axis=-1), "imbalance": np.stack(imbalance, axis=-1)}


def squares(factors: tuple[Array, ...], i: int) -> tuple[Array, Array]:
    """Return F_iᵀF_i and F_{i+1}F_{i+1}ᵀ, each (k, w_i, w_i)."""
    left, right = factors[i], factors[i + 1]
    return np.swapaxes(left, -1, -2) @ left, right @ np.swapaxes(right, -1, -2)


def _weights(cores: Cores) -> list[tuple[Array, Array]]:
    """1/η_i and 1/η_{i+1} of each pair up to a common factor, (k, 1, 1) each; 1 where either rate is 0 or unknown.

    Gradient flow conserves F_iᵀF_i/η_i − F_{i+1}F_{i+1}ᵀ/η_{i+1}. A factor that does not train keeps its own square,
    so it is weighed as if it trained alike.
    """
    one = np.ones((len(cores), 1, 1))
    if cores.learning_rate is None:
        return [(one, one)] * (cores.num_factors - 1)
    found = []
    for i in range(cores.num_factors - 1):
        pair = ratio(cores.learning_rate[:, i], cores.learning_rate[:, i + 1])[:, None, None]
        usable = np.isfinite(pair) & (pair > 0)
        found.append((one, np.where(usable, pair, 1.0)))
    return found
