"""Where base and chain cannot be fused the layer gives the same numbers by separate operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from adapters.single_layers import adapted, close, draw, gradients, is_fused, one_by_one
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from linchain_analysis.adapters.layer import ChainLinear


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Labelled(Tensor):
    """A tensor of another class, as sharded and quantised weights are."""


def patch_forward(module: nn.Module, offset: float) -> None:
    """Put a forward into the instance, as accelerate does."""
    original = module.forward
    module.forward = lambda *args: original(*args) + offset


def wrap_weight(layer: ChainLinear) -> None:
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().as_subclass(Labelled), requires_grad=False)


# What is done to the layer; the twin calls the base layer and the dropout as modules, with whatever was done to them.
UNUSUAL: dict[str, Callable[[ChainLinear], Any]] = {
    "trained weight": lambda layer: layer.base_layer.weight.requires_grad_(True),
    "trained bias": lambda layer: layer.base_layer.bias.requires_grad_(True),
    "frozen A side": lambda layer: layer.lora_A.requires_grad_(False),
    "frozen B": lambda layer: layer.lora_B.requires_grad_(False),
    "another class": lambda layer: setattr(layer.base_layer, "__class__", Doubled),
    "patched base": lambda layer: patch_forward(layer.base_layer, 3.0),
    "hooked base": lambda layer: layer.base_layer.register_forward_hook(lambda *args: args[2] + 1),
    "prepared base": lambda layer: layer.base_layer.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "hooked gradient": lambda layer: layer.base_layer.register_full_backward_hook(lambda _, grads, __: (2 * grads[0],)),
    "hooked dropout": lambda layer: layer.lora_dropout["default"].register_forward_hook(lambda *args: 2 * args[2]),
    "another dropout": lambda layer: layer.lora_dropout.update({"default": nn.Tanh()}),
    "parametrized base": lambda layer: parametrize.register_parametrization(layer.base_layer, "weight", Halved()),
    "weight norm": lambda layer: torch.nn.utils.spectral_norm(layer.base_layer.eval()),
    "tensor subclass": wrap_weight,
    "other base": lambda layer: setattr(layer, "base_layer", nn.Sequential(layer.base_layer, nn.Tanh())),
}


@pytest.mark.parametrize("change", UNUSUAL)
@pytest.mark.parametrize("length", [0, 2])
def test_unusual_layers_are_served_separately(change: str, length: int) -> None:
    layer, x = adapted(5, 6, chain_length=length), draw(2, 3, 5)
    assert is_fused(layer(x))
    UNUSUAL[change](layer)
    output, expected = layer(x), one_by_one(layer, x)
    assert not is_fused(output)
    close(output.as_subclass(Tensor), expected.as_subclass(Tensor))
    close(gradients(output, x, layer), gradients(expected, x, layer))


@pytest.mark.parametrize("context", [forward_ad.dual_level, lambda: FlopCounterMode(display=False)])
def test_unusual_surroundings(context: Callable) -> None:
    layer, x = adapted(6, 5), draw(2, 3, 6)
    with context():
        output = layer(x)
    assert not is_fused(output)
    close(output, one_by_one(layer, x))
    close(gradients(output, x, layer), gradients(one_by_one(layer, x), x, layer))


def test_hooks_on_every_module_see_every_module() -> None:
    layer, x, seen = adapted(6, 5), draw(3, 6), set()
    handle = register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        output = layer(x)
    finally:
        handle.remove()
    assert seen >= {layer, layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]}
    close(output, one_by_one(layer, x))


def test_factors_with_a_forward_of_their_own_are_called() -> None:
    layer, x = adapted(6, 5), draw(3, 6)
    expected = layer(x) + 7 * layer.scaling["default"]
    patch_forward(layer.lora_B["default"], 7.0)
    close(layer(x), expected)


@pytest.mark.parametrize("length", [0, 3])
def test_offloaded_weights_are_fetched(length: int) -> None:
    layer, x = adapted(6, 5, chain_length=length), draw(3, 6)
    expected = layer(x)
    cpu_offload(layer, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    with torch.no_grad():
        close(layer(x), expected.detach())


def test_mixed_dtypes_are_served_separately() -> None:
    layer, x = adapted(6, 5), draw(3, 6)
    expected = one_by_one(layer, x)
    layer.lora_B.to(torch.float32)
    layer.lora_A.to(torch.float32)
    output = layer(x)
    assert not is_fused(output)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [0, 3])
def test_function_transforms(length: int) -> None:
    layer, x = adapted(6, 5, chain_length=length), draw(4, 3, 6).detach()
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, x: Tensor) -> Tensor:
            return one_by_one(self.inner, x)

    def ours(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, weights, (x,)).sin().sum()

    def twin(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(Separate(), {f"inner.{k}": v for k, v in weights.items()}, (x,)).sin().sum()

    ensemble = {name: torch.stack([weight, 2 * weight]) for name, weight in weights.items()}
    for transform in (
        lambda f: f(weights, x),
        lambda f: grad(f)(weights, x),
        lambda f: vmap(grad(f), (None, 0))(weights, x),
        lambda f: vmap(f, (0, None))(ensemble, x),
        lambda f: jvp(lambda y: f(weights, y), (x,), (x.cos(),)),
        lambda f: torch.func.hessian(lambda y: f(weights, y))(x[0, 0]),
        lambda f: torch.autograd.functional.jacobian(lambda y: f(weights, y), x, vectorize=True),
    ):
        torch.testing.assert_close(transform(ours), transform(twin), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [0, 3])
def test_traced_and_exported_layers_take_other_batches(length: int) -> None:
    layer, x = adapted(6, 5, chain_length=length), draw(4, 6).detach()
    layer.eval().requires_grad_(False)
    other = draw(7, 6).detach()
    with torch.no_grad():
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        torch.testing.assert_close(traced(other), layer(other), rtol=1e-12, atol=1e-12)
        exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
        torch.testing.assert_close(exported.module()(other), layer(other), rtol=1e-12, atol=1e-12)
