"""How the weight changes of several adapters lie to each other, matrix by matrix."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from linchain_analysis.auditing.saved import SavedAdapter, SavedChain
from linchain_analysis.auditing.spectra import decompose
from linchain_analysis.measures.spectral import Array
from linchain_analysis.measures.subspaces import principal_angles, subspace_similarity


def compare_adapters(adapters: Sequence[SavedAdapter], *, num_directions: int | None = None) -> pd.DataFrame:
    """Compare the singular subspaces of delta of each pair of adapters, on each matrix that both change.

    Directions below the rounding of the stored factors are left out. A matrix whose delta is refused, zero or not
    finite in one of the two is not compared.

    Args:
        adapters: At least two.
        num_directions: How many leading directions of each to compare; all unless told otherwise.

    Returns:
        One row per pair, module and side (`left`: input side, `right`: output side) with the compared directions of
        both, the similarity φ in 0 … 1, what two random subspaces would have on average (max(i, j)/d), the smallest
        and largest principal angle in degrees, and all of them.
    """
    held: dict[str, dict[str, tuple[SavedAdapter, SavedChain]]] = {}
    for adapter in adapters:
        for chain in adapter.chains:
            if chain.refused is None:
                held.setdefault(chain.module, {})[adapter.name] = (adapter, chain)
    rows = []
    for module, owners in held.items():
        if len(owners) < 2:
            continue
        vectors = {name: _vectors(*owner, num_directions) for name, owner in owners.items()}
        chain = next(iter(owners.values()))[1]
        for one, two in combinations(owners, 2):
            for side, first, second in zip(("left", "right"), vectors[one], vectors[two], strict=True):
                if first.shape[1] and second.shape[1] and len(first) == len(second):
                    place = {"adapter_1": one, "adapter_2": two, "module": module, "kind": chain.kind, "side": side}
                    rows.append({**place, **_compare(first, second)})
    return pd.DataFrame(rows)


def _vectors(adapter: SavedAdapter, chain: SavedChain, count: int | None) -> tuple[Array, Array]:
    left, right = decompose(adapter.read(chain), chain.scale, chain.epsilon).vectors()
    return left[:, :count], right[:, :count]


def _compare(first: Array, second: Array) -> dict[str, Any]:
    i, j = first.shape[1], second.shape[1]
    angles = np.degrees(principal_angles(first, second))
    return {
        "directions_1": i,
        "directions_2": j,
        "similarity": float(subspace_similarity(first, second, i, j)),
        "similarity_by_chance": max(i, j) / len(first),
        "smallest_angle": float(angles[0]),
        "largest_angle": float(angles[-1]),
        "angles": angles,
    }
