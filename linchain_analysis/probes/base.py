"""The frozen weights under the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from linchain_analysis.probes.chains import Chain


@torch.no_grad()
def base_norms(chains: Sequence[Chain]) -> NDArray[np.float64]:
    """Return the Frobenius norm of each chain's effective weight as it is now, (num_chains,).

    NaN where the frozen weight is not stored as floating-point numbers (quantised) or is not on this process whole.
    """
    norms = [_base_norm(chain) for chain in chains]
    return np.array([float("nan") if norm is None else float(norm) for norm in norms])


def _base_norm(chain: Chain) -> torch.Tensor | None:
    weight = chain.base_weight
    if weight is None or not weight.is_floating_point() or weight.is_meta or type(weight).__name__ == "DTensor":
        return None
    plain = torch.linalg.vector_norm(weight.detach().float())
    if not bool(torch.isfinite(plain)):
        return None
    views = [factor.view(factor.parameter.detach()).float() for factor in chain.factors]
    if chain.refused or any(not bool(view.any()) for view in views):
        return torch.as_tensor(plain)
    # An adapter whose product is not zero at the start (PiSSA, …) holds a part of the weight.
    base, product = weight.detach().float().flatten(1), chain.scale * torch.linalg.multi_dot(views)
    product = product.mT if _is_stored_transposed(chain) else product
    whole: torch.Tensor | None = torch.linalg.vector_norm(base + product) if base.shape == product.shape else None
    return whole


def _is_stored_transposed(chain: Chain) -> bool:
    """Whether the frozen weight is (d_out, d_in), as it is but for embeddings and GPT-2's Conv1D."""
    layer: Any = chain.adapted
    return not (getattr(layer, "fan_in_fan_out", False) or isinstance(layer.get_base_layer(), nn.Embedding))
