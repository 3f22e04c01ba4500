"""The frozen weights under the adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from linchain_analysis.probes.chains import Chain


@torch.no_grad()
def base_norms(chains: Sequence[Chain], start: Mapping[str, NDArray[np.floating]] | None = None) -> NDArray[np.float64]:
    """Return the Frobenius norm of each chain's effective weight when training began, (num_chains,).

    Args:
        chains: Whose weights.
        start: The factors then, in chain view by `module/factor`, of chains whose product was not zero; None where
            training begins now.

    NaN where the frozen weight is not stored as floating-point numbers (quantised) or is not on this process whole.
    """
    norms = [_base_norm(chain, _views(chain, start)) for chain in chains]
    return np.array([float("nan") if norm is None else float(norm) for norm in norms])


def _views(chain: Chain, start: Mapping[str, NDArray[np.floating]] | None) -> list[torch.Tensor]:
    """The factors when training began, float32; none where their product was zero."""
    if start is None:
        views = [factor.view(factor.parameter.detach()).float() for factor in chain.factors]
        return views if all(bool(view.any()) for view in views) else []
    found = [start.get(f"{chain.module}/{factor.name}") for factor in chain.factors]
    weight = chain.factors[0].parameter
    return [torch.from_numpy(view).to(weight.device, torch.float32) for view in found if view is not None]


def _base_norm(chain: Chain, views: Sequence[torch.Tensor]) -> torch.Tensor | None:
    weight = chain.base_weight
    if weight is None or not weight.is_floating_point() or weight.is_meta or type(weight).__name__ == "DTensor":
        return None
    plain = torch.linalg.vector_norm(weight.detach().float())
    if not bool(torch.isfinite(plain)):
        return None
    if chain.refused or len(views) != len(chain.factors):
        return torch.as_tensor(plain)
    # An adapter whose product is not zero at the start (PiSSA, …) holds a part of the weight.
    base, product = weight.detach().float().flatten(1), chain.scale * torch.linalg.multi_dot(list(views))
    product = product.mT if _is_stored_transposed(chain) else product
    whole: torch.Tensor | None = torch.linalg.vector_norm(base + product) if base.shape == product.shape else None
    return whole


def _is_stored_transposed(chain: Chain) -> bool:
    """Whether the frozen weight is (d_out, d_in), as it is but for embeddings and GPT-2's Conv1D."""
    layer: Any = chain.adapted
    return not (getattr(layer, "fan_in_fan_out", False) or isinstance(layer.get_base_layer(), nn.Embedding))
