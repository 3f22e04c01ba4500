"""How a weight change lies to the weight it changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from linchain_analysis.auditing.base import base_weight
from linchain_analysis.auditing.cache import leading_vectors_of
from linchain_analysis.auditing.saved import SavedChain
from linchain_analysis.auditing.spectra import Decomposition
from linchain_analysis.measures.cores import ratio
from linchain_analysis.measures.intruders import find_intruders
from linchain_analysis.measures.randomized import randomized_svd
from linchain_analysis.measures.spectral import Array, frobenius_norm, spectral_norm
from linchain_analysis.measures.subspaces import Directions, alignment, amplification

NUM_BASE_VECTORS = 64
NUM_CHANGED_VECTORS = 10  # as in Shuttleworth et al. 2024 (arXiv 2410.21228)
_SEED = 0


class BaseComparison:
    """Compares each delta with W_0 of `model`; what it returns are columns of the table of modules.

    Args:
        model: The base model, with its weights as they are stored.
        num_vectors: K, how many singular vectors of W_0 to know; all where it has no more.
    """

    def __init__(self, model: nn.Module, num_vectors: int = NUM_BASE_VECTORS) -> None:
        self._model = model
        self._num_vectors = num_vectors

    def __call__(self, chain: SavedChain, factors: Sequence[Array], found: Decomposition) -> dict[str, Any]:
        """Return the comparison of one matrix; NaN where delta is zero or not finite."""
        weight = base_weight(self._model, chain)
        # NumPy has no bfloat16; float32 holds every value of it.
        base = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32).numpy()
        count = min(self._num_vectors, *chain.size)
        known = leading_vectors_of(weight, count, _SEED, lambda: randomized_svd(base, count, seed=_SEED))
        top, norm = float(known.sigma[0]), float(frobenius_norm(_row_norms(base)))
        row = {
            "base_norm": norm,
            "base_spectral_norm": top,
            "relative_delta": float(ratio(frobenius_norm(found.sigma), np.array(norm))),
            "relative_spectral_norm": float(ratio(spectral_norm(found.sigma), np.array(top))),
            "base_directions": count,
            "base_alignment_left_by_chance": float(np.sqrt(count / chain.size[0])),
            "base_alignment_right_by_chance": float(np.sqrt(count / chain.size[1])),
        }
        return row | _compare(chain, factors, found, base, known)


def _compare(
    chain: SavedChain, factors: Sequence[Array], found: Decomposition, base: Any, known: Directions
) -> dict[str, float]:
    names = ("base_alignment_left", "base_alignment_right", "amplification", "intruders_lower", "intruders_upper")
    if not found.rank:
        return dict.fromkeys(names, float("nan"))
    num_changed = min(NUM_CHANGED_VECTORS, *chain.size)
    intruders = find_intruders(base, factors, known, scale=chain.scale, count=num_changed, seed=_SEED)
    return {
        "base_alignment_left": float(alignment(_present(known.left), factors, side="left")),
        "base_alignment_right": float(alignment(_present(known.right), factors, side="right")),
        "amplification": float(amplification(factors, base, scale=chain.scale, count=found.rank)),
        "intruders_lower": float(intruders.num_lower),
        "intruders_upper": float(intruders.num_upper),
    }


def _present(basis: Array) -> Array:
    """The columns that exist: of a rank-deficient W_0 the last ones do not."""
    return basis[:, np.isfinite(basis).all(axis=0)]


def _row_norms(base: Any) -> Array:
    """Norms of the rows, in float64 row by row so that no copy of the whole is made."""
    return np.array([np.sqrt(np.sum(np.square(row, dtype=np.float64))) for row in base])
