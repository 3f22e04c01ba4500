"""The norm of all gradients of an optimiser, as clipping would measure it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from linchain_analysis.probes.host import readable


@torch.no_grad()
def norm_of_gradients(optimizer: Optimizer, scale: Tensor | None = None) -> Tensor | None:
    """Return √Σ‖g‖² over all parameters of `optimizer`, divided by `scale`; None where no parameter has a gradient.

    Norms of single gradients are taken in their own dtype, as `torch.nn.utils.clip_grad_norm_` takes them, and summed
    in float64; gradients of less than 32 bits, and those whose squares overflow, are widened first.
    """
    grads = [p.grad.detach() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return None
    dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    single = [grad if grad.dtype.itemsize >= 4 else grad.float() for grad in dense]
    total = _total(torch._foreach_norm(single))
    if total.device.type == "cpu" and not torch.isfinite(total):
        total = _total([torch.linalg.vector_norm(readable(grad), dtype=torch.float64) for grad in single])
    return total if scale is None else total / scale.to(total.device)


def _total(norms: Sequence[Tensor]) -> Tensor:
    first = readable(norms[0])
    stacked = torch.stack([readable(norm).to(first.device) for norm in norms])
    total: Tensor = torch.linalg.vector_norm(stacked.double())
    return total
