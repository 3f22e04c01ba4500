"""The frozen weights under the adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from linchain_analysis.probes.chains import Chain
from linchain_analysis.probes.shards import is_sharded, square_of_shard

_NAN = float("nan")


@torch.no_grad()
def base_norms(
    chains: Sequence[Chain],
    start: Mapping[str, NDArray[np.floating]] | None = None,
    squares: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Return the Frobenius norm of each chain's effective weight when training began, (num_chains,).

    Args:
        chains: Whose weights.
        start: The factors then, in chain view by `module/factor`, of chains whose product was not zero; None where
            training begins now.
        squares: ‖W‖² of frozen weights that several processes hold together (`base_squares`), (num_chains,).

    NaN where the frozen weight is not stored as floating-point numbers (quantised), or is not on this process whole
    and either its square is not known or the adapter holds a part of it.
    """
    norms = []
    for c, chain in enumerate(chains):
        weight, views = chain.base_weight, _views(chain, start)
        if weight is not None and is_sharded(weight):
            square = _NAN if squares is None or views else float(squares[c])
            norms.append(np.sqrt(square) if np.isfinite(square) else _NAN)
        else:
            norm = _base_norm(chain, views)
            norms.append(_NAN if norm is None else float(norm))
    return np.array(norms, dtype=np.float64)


@torch.no_grad()
def base_squares(chains: Sequence[Chain]) -> list[float]:
    """Return what this process adds to ‖W‖² of each frozen weight that several hold together; 0 of the others."""
    found = []
    for chain in chains:
        weight = chain.base_weight
        if weight is None or not is_sharded(weight):
            found.append(0.0)
        else:
            found.append(square_of_shard(weight) if weight.is_floating_point() else _NAN)
    return found


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
    if weight is None or not weight.is_floating_point() or weight.is_meta:
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
