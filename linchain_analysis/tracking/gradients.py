"""The norm of all gradients of an optimiser, as clipping would measure it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from linchain_analysis.probes.host import readable
from linchain_analysis.probes.shards import counts_here, local_part


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


@torch.no_grad()
def square_of_shards(optimizer: Optimizer, scale: Tensor | None = None) -> Tensor | None:
    """Return what this process adds to Σ‖g‖² over all parameters of `optimizer`; None where none has a gradient.

    Parts of sharded gradients add up over the processes, and what all of them hold alike counts on one. NaN where
    gradients are not added up yet.

    Args:
        optimizer: Whose parameters.
        scale: What the gradients still hold of a gradient scaler.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not parameters:
        return None
    counts = [counts_here(p.grad) for p in parameters]
    if None in counts:
        return torch.tensor(torch.nan, dtype=torch.float64)
    grads = [local_part(p.grad) for p, counts_one in zip(parameters, counts, strict=True) if counts_one]
    norm = _norm([grad for grad in grads if grad.numel()])
    if norm is None:
        return torch.zeros((), dtype=torch.float64)
    return (norm if scale is None else norm / local_part(scale).to(norm.device)) ** 2


def _norm_of_others(optimizer: Optimizer, known_ids: Collection[int]) -> Tensor | None:
    parameters = (p for group in optimizer.param_groups for p in group["params"] if id(p) not in known_ids)
    return _norm([p.grad.detach() for p in parameters if p.grad is not None])


def _norm(grads: Sequence[Tensor]) -> Tensor | None:
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
