"""The norm of all gradients of an optimiser, as clipping would measure it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from linchain_analysis.probes.host import readable


@torch.no_grad()
def norm_of_gradients(
    optimizer: Optimizer, scale: Tensor | None = None, known: Sequence[Tensor] = (), known_ids: Collection[int] = ()
) -> Tensor | None:
    """Return √Σ‖g‖² over all parameters of `optimizer`, divided by `scale`; None where no parameter has a gradient.

    Norms of single gradients are taken in their own dtype, as `torch.nn.utils.clip_grad_norm_` takes them, and summed
    in float64; gradients of less than 32 bits, and those whose squares overflow, are widened first.

    Args:
        optimizer: Whose parameters.
        scale: What the gradients still hold of a gradient scaler.
        known: Sums of ‖g‖² that were taken already, without `scale`, of the parameters in `known_ids`.
        known_ids: Identities of these parameters.
    """
    others = _norm_of_others(optimizer, known_ids)
    if others is not None and scale is not None:
        others = others / scale.to(others.device)
    if not known:
        return others
    device = known[0].device if others is None else others.device
    squares = [part.to(device) for part in known] + ([] if others is None else [others.double() ** 2])
    total: Tensor = torch.stack(squares).sum().sqrt()
    return total


def _norm_of_others(optimizer: Optimizer, known_ids: Collection[int]) -> Tensor | None:
    parameters = (p for group in optimizer.param_groups for p in group["params"] if id(p) not in known_ids)
    grads = [p.grad.detach() for p in parameters if p.grad is not None]
    if not grads:
        return None
    dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    single = [grad if grad.dtype.itemsize >= 4 else grad.float() for grad in dense]
    total = _total(torch._foreach_norm(single))
    if total.device.type == "cpu" and not torch.isfinite(total):
        total = _total([torch.linalg.vector_norm(readable(grad), dtype=torch.float64) for grad in single])
    return total


def _total(norms: Sequence[Tensor]) -> Tensor:
    first = readable(norms[0])
    stacked = torch.stack([readable(norm).to(first.device) for norm in norms])
    total: Tensor = torch.linalg.vector_norm(stacked.double())
    return total
