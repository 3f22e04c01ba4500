"""A frozen linear layer and its folded chain as one operation, with no temporary of the size of its input or output."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from linchain_analysis.adapters.chain import has_autocast, without_autocast

# Subclasses of these (sharded, quantised, fake, traced tensors) have rules of their own.
_TENSORS = (Tensor, nn.Parameter)
_AUTOCAST_DTYPES = {torch.float32, torch.float16, torch.bfloat16}  # what autocast touches: float64 is left alone


def fused_linear(base_layer: nn.Module, dropout: nn.Module, x: Tensor, first: Tensor, last: Tensor) -> Tensor | None:
    """Return base_layer(x) plus the chain's term, (…, d_out), or None where only separate operations are safe.

    Under autocast everything takes autocast's dtype, as each operation would have taken it alone.

    Args:
        base_layer: The layer that is adapted.
        dropout: Applied to what the chain reads.
        x: (…, d_in).
        first: The chain folded into two factors stored like `nn.Linear`: (r, d_in) …
        last: … and (d_out, r).
    """
    # The first of these is all that a compiler sees: it fuses separate operations itself.
    if torch.compiler.is_compiling() or _is_transformed():
        return None
    if type(base_layer) is not nn.Linear or type(dropout) not in (nn.Identity, nn.Dropout):
        return None
    if is_hooked(base_layer) or is_hooked(dropout):
        return None
    weight, bias = base_layer.weight, base_layer.bias
    tensors = [x, first, last, weight] if bias is None else [x, first, last, weight, bias]
    if not all(type(tensor) in _TENSORS and tensor.layout is torch.strided for tensor in tensors):
        return None
    trains = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    # Where one factor is frozen, separate operations keep less for backward; the gradient of the base is not made here.
    if any(trains[3:]) or (any(trains) and not (trains[1] and trains[2])):
        return None
    dtypes = {tensor.dtype for tensor in tensors}
    casts = has_autocast(x.device.type)
    if not (dtypes <= _AUTOCAST_DTYPES if casts else len(dtypes) == 1 and x.is_floating_point()):
        return None
    dropped = dropout(x.to(first.dtype)) if dropout.training and type(dropout) is nn.Dropout else None
    operands = [x, dropped, first, last, weight, bias]
    if casts:
        dtype = torch.get_autocast_dtype(x.device.type)
        operands = [None if operand is None else operand.to(dtype) for operand in operands]
    with without_autocast(x.device.type):
        return cast(Tensor, FusedLinear.apply(*operands))  # type: ignore[no-untyped-call]


class FusedLinear(torch.autograd.Function):
    """x W + bias + source A B, where A and B train and W and bias do not.

    The small term is added into the fresh result of the large one, in forward and in the gradient of x. Kept for
    backward is what LoRA keeps: source, source A and the matrices.
    In backward the thin products are formed with r as their first axis, which BLAS does up to five times faster.

    Args of `apply`, all of one dtype:
        x: (…, d_in), what the base layer reads.
        dropped: (…, d_in), the source where it is not x, or None.
        first: A, (r, d_in).
        last: B, (d_out, r).
        weight: W, (d_out, d_in).
        bias: (d_out,) or None.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, first: Tensor, last: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Return (…, d_out)."""
        source = x if dropped is None else dropped
        # Made whole and filled by rows: a model may not change in place a view that comes out of an autograd function.
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        rows = out.view(out.shape[:-1].numel(), out.shape[-1])
        if bias is None:
            torch.mm(as_rows(x), weight.t(), out=rows)
        else:
            torch.addmm(bias, as_rows(x), weight.t(), out=rows)
        hidden = F.linear(as_rows(source), first)  # (rows, r)
        rows.addmm_(hidden, last.t())
        ctx.save_for_backward(source, hidden, first, last, weight)
        ctx.is_dropped = dropped is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, dropped, first and last."""
        needs_x, needs_dropped, needs_first, needs_last, *_ = ctx.needs_input_grad
        source, hidden, first, last, weight = ctx.saved_tensors
        grad_x = grad_dropped = grad_first = grad_last = None
        with without_autocast(grad.device.type):  # forward has settled the dtype
            rows = as_rows(grad)
            inner = last.t() @ rows.t()  # the gradient of hidden, (r, rows)
            if needs_x:
                grad_x = F.linear(grad, weight.t())
                if not ctx.is_dropped:
                    grad_x = _add_product(grad_x, inner.t(), first)
            if needs_dropped:
                grad_dropped = (inner.t() @ first).view(source.shape)
            if needs_first:
                grad_first = inner @ as_rows(source)
            if needs_last:
                if torch.is_grad_enabled():
                    hidden = F.linear(as_rows(source), first)  # the one that was kept is no part of the graph
                grad_last = (hidden.t() @ rows).t()
        return grad_x, grad_dropped, grad_first, grad_last, None, None


def is_hooked(module: nn.Module) -> bool:
    """Tell whether more happens when `module` is called than its class says, so that it has to be called."""
    # Sharding (ZeRO-3, FSDP) gathers parameters in hooks; accelerate puts a forward of its own into the instance.
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
        or module_hooks._has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def as_rows(tensor: Tensor) -> Tensor:
    """Return (…, d) as (rows, d); the rows are counted, because an empty batch leaves -1 undetermined."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _is_transformed() -> bool:
    """Tell whether torch.func, forward-mode derivatives, tracing or a dispatch mode is on.

    A dispatch mode may keep the results of single operations, as selective checkpointing does, which must not change.
    """
    return bool(
        torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return total (…, d) plus left (rows, r) times right (r, d), in the memory of `total` unless a graph keeps it."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return total + (left @ right).view(total.shape)
    total.view(left.shape[0], right.shape[1]).addmm_(left, right)
    return total
