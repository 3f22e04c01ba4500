"""Every hook and patch through which the tracker sees a training it does not control.

What is watched, and why there:
    torch.autograd.backward     the loss, whoever computes it: the scalars on which backward is called
    GradScaler.scale, .step     to undo the scale of a loss, and to see steps that the scaler leaves out
    clipping by norm or value   gradients must be read before it, and its coefficient kept
    Optimizer.__init__          which optimisers there are, for scripts that say nothing
    Optimizer.step              the step itself; a closure is wrapped, since it may hold the whole backward pass
    _init_optim_state           steps of torch's distributed checkpoints that are none: they only make the state
    CallbackHandler.call_event  what transformers' Trainer tells of a training, for scripts that say nothing

The patches are put in when the first listener comes, and taken out when the last one leaves. Each calls the original
with what it was given and returns what that returned. Nothing here keeps an optimiser alive, and a forked process
starts without listeners: what it trains is not what is tracked here.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import wrapt
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_CHECKPOINTS = "torch.distributed.checkpoint.state_dict"


class Listener(Protocol):
    """What is told of a training. No method may raise."""

    @property
    def optimizer(self) -> Optimizer:
        """Who is followed."""

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
        self._optimizer = weakref.ref(optimizer)
        self._handles = [
            # A compiled training step is left for these, instead of being traced through them.
            optimizer.register_step_pre_hook(_leaving_compiled_code(self._before_step)),
            optimizer.register_step_post_hook(_leaving_compiled_code(self._after_step)),
        ]
        self.num_steps_seen = 0
        _PATCHES.add(self)

    @property
    def listener(self) -> Listener:
        """Who is told."""
        return self._listener

    @property
    def optimizer(self) -> Optimizer | None:
        """Who is watched; None once nobody else needs it."""
        return self._optimizer()

    def close(self) -> None:
        """Stop watching; the last to leave takes the patches out."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _PATCHES.remove(self)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _PATCHES.makes_state:
            return None
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
        if _PATCHES.makes_state:
            return
        self.num_steps_seen += 1
        self._listener.after_step(getattr(optimizer, "found_inf", None))


class Scout:
    """Told of everything that any optimiser does, before it is known which optimisers there are.

    Args:
        created: An optimiser was made.
        after_backward: A backward pass ended, from these losses, scaled by this scaler.
        before_step: An optimiser is about to step.
        trainer_event: A Trainer's callback handler has passed on an event: its name, the Trainer's arguments and state,
            and what else came with it.
    """

    def __init__(
        self,
        *,
        created: Callable[[Optimizer], None],
        after_backward: Callable[[Sequence[Tensor], Any], None],
        before_step: Callable[[Optimizer], None],
        trainer_event: Callable[[Any, str, Any, Any, Mapping[str, Any]], None],
    ) -> None:
        self.created = created
        self.after_backward = after_backward
        self.trainer_event = trainer_event
        told = _PATCHES.apart(before_step)
        self._handle = register_optimizer_step_pre_hook(
            lambda optimizer, args, kwargs: None if _PATCHES.makes_state else told(optimizer)
        )
        _PATCHES.add(self)

    def close(self) -> None:
        """Hear no more."""
        self._handle.remove()
        _PATCHES.remove(self)


def is_watched(optimizer: Optimizer) -> bool:
    """Whether somebody follows `optimizer` (unwrapped) already."""
    return _PATCHES.watches(optimizer)


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
        self._apart: list[list[Callable[..., Any]]] = []  # functions that were there before the compiler
        self._tell_of_clipping: Callable[..., Any] = self._tell_listeners
        self._prepared = False

    def apart(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` so that a compiled training step is left for it, instead of being traced through it.

        Until somebody imports the compiler, which takes seconds, there is none to be left.
        """
        if "torch._dynamo" in sys.modules:
            return _leaving_compiled_code(function)
        held = [function]
        self._apart.append(held)
        return lambda *args, **kwargs: held[0](*args, **kwargs)

    def _leave_compiled_code(self) -> None:
        for held in self._apart:
            held[0] = _leaving_compiled_code(held[0])

    def add(self, one: Watch | Scout) -> None:
        with self._lock:
            if not self._watches and not self._scouts:
                self._install()
            if isinstance(one, Watch):
                self._watches.append(one)
                return
            self._scouts.append(one)
            if len(self._scouts) == 1:  # at once where that module is there already
                wrapt.when_imported("transformers.trainer_callback")(self._watch_trainers)

    def watches(self, optimizer: Optimizer) -> bool:
        return any(watch.optimizer is optimizer for watch in list(self._watches))

    def leave_all(self) -> None:
        """In a forked process: nobody there is told of anything."""
        self._lock = threading.RLock()  # another thread may have held it
        everyone: list[Any] = [*self._watches, *self._scouts]
        for one in everyone:
            one.close()

    def remove(self, one: Watch | Scout) -> None:
        with self._lock:
            among: list[Any] = self._watches if isinstance(one, Watch) else self._scouts
            if one in among:
                among.remove(one)
                if not self._watches and not self._scouts:
                    self._uninstall()

    def _prepare(self) -> None:
        """What stays for as long as the process lives, and does nothing while there are no listeners."""
        if self._prepared:
            return
        self._prepared = True
        wrapt.when_imported("torch._dynamo")(lambda _: self._leave_compiled_code())
        wrapt.when_imported(_CHECKPOINTS)(self._watch_checkpoints)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.leave_all)

    @property
    def makes_state(self) -> bool:
        """Whether this thread steps an optimiser only to make its state, with gradients and rate 0: no step at all."""
        return getattr(self._busy, "makes_state", False)

    def _install(self) -> None:
        self._prepare()
        self._tell_of_clipping = self.apart(self._tell_listeners)
        scaler = torch.amp.GradScaler
        self._replace(Optimizer, "__init__", self._create)
        self._replace(torch.autograd, "backward", self.apart(self._backward))
        self._replace(scaler, "scale", self.apart(self._scale))
        self._replace(scaler, "step", self.apart(self._scaler_step))
        self._replace_inside(clip_grad, "_clip_grads_with_norm_", self._clip_by_norm)
        self._replace_inside(clip_grad, "clip_grad_value_", self._clip_by_value)
        if (checkpoints := sys.modules.get(_CHECKPOINTS)) is not None:
            self._watch_checkpoints(checkpoints)

    def _watch_trainers(self, module: Any) -> None:
        handler = module.CallbackHandler
        if self._scouts and not any(owner is handler for owner, *_ in self._originals):
            self._replace(handler, "call_event", self._call_event)

    def _watch_checkpoints(self, module: Any) -> None:
        # While nobody listens there are no patches: the next to come puts this one in, too.
        if self._originals and not any(owner is module for owner, *_ in self._originals):
            self._replace(module, "_init_optim_state", self._make_state)

    def _make_state(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._busy.makes_state = True
        try:
            return original(*args, **kwargs)
        finally:
            self._busy.makes_state = False

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

        @functools.wraps(original)  # also what pickle finds it by
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        setattr(owner, name, replacement)
        self._originals.append((owner, name, original, replacement))

    def _uninstall(self) -> None:
        for owner, name, original, replacement in reversed(self._originals):
            if getattr(owner, name, None) is replacement:  # somebody else's later patch stays, around ours
                setattr(owner, name, original)
        self._originals, self._apart = [], []
        self._scaled.clear()

    def _create(self, original: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        original(optimizer, *args, **kwargs)
        for scout in list(self._scouts):
            scout.created(optimizer)

    def _call_event(
        self, original: Callable[..., Any], handler: Any, event: str, args: Any, state: Any, control: Any, **more: Any
    ) -> Any:
        result = original(handler, event, args, state, control, **more)
        for scout in list(self._scouts):
            scout.trainer_event(handler, event, args, state, more)
        return result

    def _listeners(self) -> list[Listener]:
        # A copy, since an optimiser that goes takes its watch with it at any moment.
        return [watch.listener for watch in list(self._watches) if watch.optimizer is not None]

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
        inner = unwrap_optimizer(optimizer)
        watches = [watch for watch in list(self._watches) if watch.optimizer is inner]
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
            total_norm, whole = _add_up(total_norm)
            coef = torch.clamp(float(max_norm) / (whole + 1e-6), max=1.0)
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


def _add_up(norm: Any) -> tuple[Any, Tensor]:
    """Return a norm as clipping can go on with it, and as a plain tensor.

    Of sharded gradients it is in parts yet, which clipping would add up. Here that is done for it, not once more: the
    processes of a training have to communicate equally often, whether each of them is watched or not.
    """
    if not hasattr(norm, "full_tensor"):
        return norm, norm.detach()
    from torch.distributed.tensor import Replicate

    norm = norm.detach().redistribute(placements=[Replicate()] * norm.device_mesh.ndim)
    return norm, norm.to_local()


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
