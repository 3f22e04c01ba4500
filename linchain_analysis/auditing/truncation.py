"""Functional rank: how many singular directions of every delta the loss needs.

Every module is truncated to its top k singular values together. With V_k the top right singular vectors of delta,
delta V_k V_kᵀ is its best approximation of rank k, so that only B changes: B → B V_k V_kᵀ, for a chain of any length,
a convolution or an embedding alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from linchain_analysis.adapters.layer import read_factors
from linchain_analysis.auditing.base import adapted_layers
from linchain_analysis.auditing.saved import SavedAdapter
from linchain_analysis.auditing.spectra import decompose
from linchain_analysis.auditing.texts import Batch, num_predicted
from linchain_analysis.errors import InputError
from linchain_analysis.measures.spectral import Array

KEEP = 0.99


@dataclass(frozen=True)
class FunctionalRank:
    """What truncation does to the loss of one adapter.

    Attributes:
        rank: Smallest k whose loss keeps the share of the gain; NaN where there is no gain.
        keep: The share.
        base_loss: Mean over predicted tokens, nats, without the adapter.
        adapted_loss: The same with all of it.
        losses: Loss by k, as far as it was measured: k rises from 0 until the gain is kept.
        num_tokens: Predicted tokens.
    """

    rank: float
    keep: float
    base_loss: float
    adapted_loss: float
    losses: Mapping[int, float]
    num_tokens: int

    @property
    def gain(self) -> float:
        """Loss of the base model minus loss of the adapted one."""
        return self.base_loss - self.adapted_loss


def measure_functional_rank(
    model: Any, adapter: SavedAdapter, batches: Sequence[Batch], *, keep: float = KEEP
) -> FunctionalRank:
    """Raise the truncation rank from 0 until it keeps the share `keep` of the gain in loss.

    Going up one by one and not by halving finds the smallest such rank also where the loss does not fall at every
    step. The model is in evaluation mode; its factors are as before at the end.

    Args:
        model: The `PeftModel` with this adapter alone.
        adapter: What is saved of it; its delta is not refused and it changes nothing else.
        batches: Fixed data.
        keep: Share of the gain, in (0, 1].
    """
    refuse_share(keep)
    lasts, vectors = _read_ends(model, adapter)
    whole = [last.detach().clone() for last in lasts]
    adapted = _mean_loss(model, batches)
    longest = max((basis.shape[1] for basis in vectors), default=0)
    losses: dict[int, float] = {}
    rank = float("nan")
    try:
        for k in range(longest + 1):
            for last, full, basis in zip(lasts, whole, vectors, strict=True):
                last.data.copy_(_project(full, basis[:, :k]))
            losses[k] = _mean_loss(model, batches)
            if not losses[0] > adapted:
                break
            if losses[0] - losses[k] >= keep * (losses[0] - adapted):
                rank = float(k)
                break
        else:
            rank = float(longest)  # all directions are there; what is missing is rounding
    finally:
        for last, full in zip(lasts, whole, strict=True):
            last.data.copy_(full)
    return FunctionalRank(rank, keep, losses[0], adapted, losses, sum(map(num_predicted, batches)))


def refuse_share(keep: float) -> None:
    """Refuse what is no share of a gain.

    Raises:
        InputError: It is not in (0, 1].
    """
    if not 0 < keep <= 1:
        raise InputError("--keep", expected="a share above 0 and at most 1", got=str(keep), do="give such a number")


def _read_ends(model: Any, adapter: SavedAdapter) -> tuple[list[torch.nn.Parameter], list[Array]]:
    """Return the live B of every module, and the right singular vectors (d_out, rank) of its delta."""
    layers = adapted_layers(model)
    lasts, vectors = [], []
    for chain in adapter.chains:
        layer: Any = layers.get(chain.module)
        if layer is None:
            raise InputError(
                f"--model, {chain.module}", expected="an adapted layer", got="none", do="name the adapter's base model"
            )
        lasts.append(read_factors(layer, "default")[-1][1])
        vectors.append(decompose(adapter.read(chain), chain.scale, chain.epsilon).vectors()[1])
    return lasts, vectors


def _project(last: torch.Tensor, basis: Array) -> torch.Tensor:
    """Return V Vᵀ B for the stored B (d_out, w_n, …), which is B V Vᵀ of the chain view."""
    matrix = last.to(torch.float64).flatten(1).numpy()
    projected = np.asarray(basis @ (basis.T @ matrix))
    return torch.from_numpy(projected).view(last.shape).to(last.dtype)


def _mean_loss(model: Any, batches: Sequence[Batch]) -> float:
    """Mean loss over all predicted tokens; a shorter last batch weighs what it holds."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            predicted = num_predicted(batch)
            if predicted:
                total += float(model(**batch).loss) * predicted
                count += predicted
    return total / count if count else float("nan")
