"""Every hook and patch through which the tracker sees a training it does not control.

What is watched, and why there:
    torch.autograd.backward     the loss, whoever computes it: the scalars on which backward is called
    GradScaler.scale, .step     to undo the scale of a loss, and to see steps that the scaler leaves out
    clipping by norm or value   gradients must be read before it, and its coefficient kept
    Optimizer.__init__          which optimisers there are, for scripts that say nothing
    Optimizer.step              the step itself; a closure is wrapped, since it may hold the whole backward pass

The patches are put in when the first listener comes, and taken out when the last one leaves. Each calls the original
with what it was given and returns what that returned.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Listener(Protocol):
    """What is told of a training. No method may raise."""

    optimizer: Optimizer

    def begin_backward(self) -> None:
        """A backward pass is about to start."""

    def end_backward(self, losses: Sequence[Tensor], scaler: Any) -> None:
        """It ended; `losses` are the scalars it started from, detached, with the scale of `scaler` undone."""

    def before_clip(self, parameters: Sequence[Tensor], coef: Tensor | None) -> None:
        """Gradients of `parameters` are about to be multiplied by `coef`, or clipped by value if it is None."""

    def before_step(self, scale: Tensor | None, *, in_closure: bool) -> None:
        """The optimiser is about to step; gradients still hold `scale`. In a closure more backward passes may come."""

    def abandon_step(self) -> None:
        """A step that had begun was left by an exception."""

    def after_step(self, found_inf: Tensor | None) -> None:
        """The optimiser stepped, or left the step out if `found_inf` is not zero."""

    def step_left_out(self) -> None:
        """The gradient scaler found Inf or NaN and did not call the optimiser."""


class Watch:
    """One listener's place among the watched: `close` ends it."""

    def __init__(self, listener: Listener) -> None:
        optimizer = unwrap_optimizer(listener.optimizer)
        self._listener = listener
        self._handles = [
            # A compiled training step is left for these, instead of being traced through them.
            optimizer.register_step_pre_hook(_leaving_compiled_code(self._before_step)),
            optimizer.register_step_post_hook(_leaving_compiled_code(self._after_step)),
        ]
        self.num_steps_seen = 0
        _PATCHES.leave_compiled_code()
        _PATCHES.add(self)

    @property
    def listener(self) -> Listener:
        """Who is told."""
        return self._listener

    def close(self) -> None:
        """Stop watching; the last to leave takes the patches out."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _PATCHES.remove(self)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._listener.before_step(getattr(optimizer, "grad_scale", None), in_closure=False)
            return None
        told = False

        def watched_closure(*closure_args: Any, **closure_kwargs: Any) -> Any:
            nonlocal told
            try:
                result = closure(*closure_args, **closure_kwargs)
            except BaseException:
                self._listener.abandon_step()
                raise
            if not told:  # LBFGS evaluates its closure again; the step's gradient is the first
                told = True
                self._listener.before_step(getattr(optimizer, "grad_scale", None), in_closure=True)
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched_closure}
        return (args[0], watched_closure, *args[2:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.num_steps_seen += 1
        self._listener.after_step(getattr(optimizer, "found_inf", None))


class Scout:
    """Told of everything that any optimiser does, before it is known which optimisers there are.

    Args:
        created: An optimiser was made.
        after_backward: A backward pass ended, from these losses, scaled by this scaler.
        before_step: An optimiser is about to step.
    """

    def __init__(
        self,
        *,
        created: Callable[[Optimizer], None],
        after_backward: Callable[[Sequence[Tensor], Any], None],
        before_step: Callable[[Optimizer], None],
    ) -> None:
        self.created = created
        self.after_backward = after_backward
        self._handle = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: before_step(optimizer))
        _PATCHES.add(self)

    def close(self) -> None:
        """Hear no more."""
        self._handle.remove()
        _PATCHES.remove(self)


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """Return the torch optimiser inside wrappers such as Accelerate's and Lightning's, which step it in turn."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer  # type: ignore[no-any-return]


class _Patches:
    """The process-wide patches and those they serve."""

    def __init__(self) -> None:
        self._watches: list[Watch] = []
        self._scouts: list[Scout] = []
        self._originals: list[tuple[Any, str, Any, Any]] = []  # owner, name, original, replacement
        self._lock = threading.RLock()
        self._busy = threading.local()
        # What GradScaler.scale was given and returned, and which scaler it was, until its backward pass.
        self._scaled: deque[tuple[Any, Tensor, Tensor]] = deque(maxlen=16)
        self._tell_of_clipping: Callable[[Sequence[Tensor], Tensor | None], None] = self._tell_listeners

    def leave_compiled_code(self) -> None:
        """From now on leave compiled code to tell of clipping. Costs an import that everything with PEFT has paid."""
        self._tell_of_clipping = _leaving_compiled_code(self._tell_listeners)

    def add(self, one: Watch | Scout) -> None:
        with self._lock:
            if not self._watches and not self._scouts:
                self._install()
            if isinstance(one, Watch):
                self._watches.append(one)
            else:
                self._scouts.append(one)

    def remove(self, one: Watch | Scout) -> None:
        with self._lock:
            among: list[Any] = self._watches if isinstance(one, Watch) else self._scouts
            if one in among:
                among.remove(one)
                if not self._watches and not self._scouts:
                    self._uninstall()

    def _install(self) -> None:
        scaler = torch.amp.GradScaler
        self._replace(Optimizer, "__init__", self._create)
        self._replace(torch.autograd, "backward", self._backward)
        self._replace(scaler, "scale", self._scale)
        self._replace(scaler, "step", self._scaler_step)
        self._replace_inside(clip_grad, "_clip_grads_with_norm_", self._clip_by_norm)
        self._replace_inside(clip_grad, "clip_grad_value_", self._clip_by_value)

    def _replace_inside(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Replace the function that a decorated one calls, so that scripts which imported it by name are seen too."""
        decorated = getattr(owner, name, None)
        names = getattr(getattr(decorated, "__code__", None), "co_freevars", ())
        if "func" not in names:  # another torch, which decorates in another way
            self._replace(owner, name, wrapper)
            return
        cell = decorated.__closure__[names.index("func")]  # type: ignore[union-attr]
        self._replace(cell, "cell_contents", wrapper)

    def _replace(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(owner, name, None)
        if original is None:
            return

        def replacement(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        replacement.__name__ = getattr(original, "__name__", name)
        replacement.__doc__ = original.__doc__
        replacement.__wrapped__ = original  # type: ignore[attr-defined]
        setattr(owner, name, replacement)
        self._originals.append((owner, name, original, replacement))

    def _uninstall(self) -> None:
        for owner, name, original, replacement in reversed(self._originals):
            if getattr(owner, name, None) is replacement:  # somebody else's later patch stays, around ours
                setattr(owner, name, original)
        self._originals = []
        self._scaled.clear()

    def _create(self, original: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        original(optimizer, *args, **kwargs)
        for scout in self._scouts:
            scout.created(optimizer)

    def _listeners(self) -> list[Listener]:
        return [watch.listener for watch in self._watches]

    def _backward(self, original: Callable[..., Any], tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self._busy, "backward", False):  # a backward pass inside another is part of it
            return original(tensors, *args, **kwargs)
        listeners = self._listeners()
        found = [self._unscale(t) for t in _tensors(tensors) if t.numel() == 1]
        losses = [loss for loss, _ in found]
        scaler = next((scaler for _, scaler in found if scaler is not None), None)
        for listener in listeners:
            listener.begin_backward()
        self._busy.backward = True
        try:
            result = original(tensors, *args, **kwargs)
        finally:
            self._busy.backward = False
        for listener in listeners:
            listener.end_backward(losses, scaler)
        for scout in list(self._scouts):
            scout.after_backward(losses, scaler)
        return result

    def _unscale(self, loss: Tensor) -> tuple[Tensor, Any]:
        """Return a copy of `loss` (scripts reuse theirs) without the scale of a scaler, and that scaler."""
        plain: Tensor = loss.detach().clone()
        for index, (scaler, given, scaled) in enumerate(self._scaled):
            if scaled is loss:
                plain = given.detach().clone()
            elif not _computed_from(loss, scaled):
                continue
            elif (scale := scaler._scale) is not None:
                # Somebody went on computing with it, such as dividing it by the accumulation steps.
                plain = plain / scale.to(plain.device)
            del self._scaled[index]
            return plain, scaler
        return plain, None

    def _scale(self, original: Callable[..., Any], scaler: Any, outputs: Any) -> Any:
        result = original(scaler, outputs)
        given = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        if scaler.is_enabled():
            returned = result if isinstance(result, (list, tuple)) else [result]
            for plain, scaled in zip(given, returned, strict=False):
                if isinstance(plain, Tensor) and isinstance(scaled, Tensor):
                    self._scaled.append((scaler, plain, scaled))
        return result

    def _scaler_step(self, original: Callable[..., Any], scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        watches = [w for w in self._watches if unwrap_optimizer(w.listener.optimizer) is unwrap_optimizer(optimizer)]
        seen = [watch.num_steps_seen for watch in watches]
        result = original(scaler, optimizer, *args, **kwargs)
        for watch, before in zip(watches, seen, strict=True):
            if watch.num_steps_seen == before:
                watch.listener.step_left_out()
        return result

    def _clip_by_norm(
        self,
        original: Callable[..., Any],
        parameters: Any,
        max_norm: Any,
        total_norm: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        parameters = _tensors(parameters)
        with torch.no_grad():  # the same arithmetic as torch.nn.utils.clip_grad
            coef = torch.clamp(float(max_norm) / (total_norm.detach() + 1e-6), max=1.0)
        self._tell_of_clipping(parameters, coef)
        return original(parameters, max_norm, total_norm, *args, **kwargs)

    def _clip_by_value(self, original: Callable[..., Any], parameters: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = _tensors(parameters)
        self._tell_of_clipping(parameters, None)
        return original(parameters, *args, **kwargs)

    def _tell_listeners(self, parameters: Sequence[Tensor], coef: Tensor | None) -> None:
        for listener in self._listeners():
            listener.before_clip(parameters, coef)


def scale_left_in(scaler: Any, optimizer: Optimizer) -> Tensor | None:
    """Return the scale that gradients of `optimizer` still hold, None where `scaler` has taken it out already.

    A script that clips without unscaling first clips scaled gradients.
    """
    if scaler is None:
        return None
    state = scaler._per_optimizer_states.get(id(unwrap_optimizer(optimizer)))
    ready = state is None or state["stage"].name == "READY"
    scale: Tensor | None = scaler._scale if ready else None
    return scale


def _leaving_compiled_code(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)  # type: ignore[no-untyped-call, no-any-return]


def _computed_from(loss: Tensor, scaled: Tensor, depth: int = 4) -> bool:
    """Whether `loss` is `scaled` after a few operations, such as a division or a sum."""
    nodes = {loss.grad_fn}
    for _ in range(depth):
        if scaled.grad_fn in nodes:
            return scaled.grad_fn is not None
        nodes = {parent for node in nodes if node is not None for parent, _ in node.next_functions}
    return False


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    return list(given) if isinstance(given, Iterable) else []


_PATCHES = _Patches()
