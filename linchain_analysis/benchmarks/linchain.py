"""What a chain costs to train: LinChain beside LoRA, beside itself without depth, and beside the frozen layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from linchain_analysis.adapters import LinChainConfig, method_config
from linchain_analysis.benchmarks.loops import TrainingLoop, trainable
from linchain_analysis.benchmarks.rows import Row, compare, summarise
from linchain_analysis.benchmarks.settings import Settings
from linchain_analysis.benchmarks.subjects import METHOD, TARGETS, adapt, adapt_by_method, build_llama, draw_tokens
from linchain_analysis.benchmarks.timing import Variant, take_turns

NUM_PAIRS = 40
NUM_LAYER_PAIRS = 150
LORA_TARGET = 0.98
DEPTH_TARGET = 1.01
ADAPTER_TARGET = 0.75
SAVED_TARGET = 1.0
LORA = "lora-16"
FLAT = "chain-length-0"
COMPOSITE = "factor-by-factor"


def measure_linchain(settings: Settings) -> Iterator[Row]:
    """Compare training steps of whole models, then forward and backward of one layer."""
    for hidden, num_layers in settings.sizes(((512, 8), (1024, 4)), ((32, 2),)):
        yield from _measure_steps(settings, hidden, num_layers)
    for width in settings.sizes((512, 1024), (32,)):
        yield from _measure_layer(settings, width)
        yield from _measure_saved(settings, width)


def _measure_steps(settings: Settings, hidden: int, num_layers: int) -> Iterator[Row]:
    base = build_llama(hidden, num_layers, settings.device)
    models = {
        LORA: adapt_by_method(base, LORA),
        METHOD: adapt_by_method(base, METHOD),
        FLAT: adapt(base, LinChainConfig(r=16, lora_alpha=32, chain_length=0, target_modules=list(TARGETS))),
        COMPOSITE: apply_one_by_one(adapt_by_method(base, LORA), num_inner=3),
    }
    batch = draw_tokens(*settings.size((8, 128), (2, 16)), device=settings.device)
    variants = [Variant(name, TrainingLoop(model, batch, clips=False).step) for name, model in models.items()]
    found = take_turns(variants, settings.pairs(NUM_PAIRS), device=settings.device)
    pairs = ((METHOD, LORA, LORA_TARGET), (METHOD, FLAT, DEPTH_TARGET), (COMPOSITE, LORA, None), (FLAT, LORA, None))
    for over, under, target in pairs:
        name = f"linchain/step/{over}-over-{under}/hidden-{hidden}x{num_layers}"
        yield compare(name, found[over], found[under], clock=settings.clock, target=target)


def _measure_layer(settings: Settings, width: int) -> Iterator[Row]:
    """Compare what LinChain and LoRA add to a frozen layer."""
    x = torch.randn(*settings.size((8, 128), (2, 16)), width, device=settings.device, requires_grad=True)
    num_passes = settings.size(max(10 * 512**2 // width**2, 1), 2)
    base = nn.Linear(width, width, bias=False, device=settings.device).requires_grad_(False)
    layers: dict[str, nn.Module] = {"base": base, LORA: adapt_layer(base, LORA), METHOD: adapt_layer(base, METHOD)}
    variants = [Variant(name, LayerPasses(layer, x, num_passes).run) for name, layer in layers.items()]
    found = take_turns(variants, settings.pairs(NUM_LAYER_PAIRS), device=settings.device, num_warmups=3)
    seconds = {name: timings.by(settings.clock) for name, timings in found.items()}
    name = f"linchain/layer/{METHOD}-over-{LORA}/width-{width}"
    yield summarise(
        f"{name}/above-base",
        (seconds[METHOD] - seconds["base"]) / (seconds[LORA] - seconds["base"]),
        target=ADAPTER_TARGET,
        note="(LinChain − frozen layer) / (LoRA − frozen layer), forward and backward",
        clock=settings.clock,
    )
    yield compare(f"{name}/whole", found[METHOD], found[LORA], clock=settings.clock)
    yield compare(f"linchain/layer/base-over-{LORA}/width-{width}", found["base"], found[LORA], clock=settings.clock)


def _measure_saved(settings: Settings, width: int) -> Iterator[Row]:
    """Compare what is saved for backward: per token, and all of it at one number of tokens."""
    few, many = settings.size((512, 1024), (16, 32))
    base = nn.Linear(width, width, bias=False, device=settings.device).requires_grad_(False)
    saved: dict[str, tuple[float, int]] = {}
    for method in (LORA, METHOD):
        layer = adapt_layer(base, method)
        at_few, at_many = (count_saved(layer, torch.randn(n, width, device=settings.device)) for n in (few, many))
        saved[method] = (at_many - at_few) / (many - few), at_many
    (lora, lora_all), (linchain, linchain_all) = saved[LORA], saved[METHOD]
    name = f"linchain/saved/{METHOD}-over-{LORA}/width-{width}"
    yield summarise(
        f"{name}/per-token",
        linchain / lora,
        target=SAVED_TARGET,
        note="bytes that each further token adds to what is saved for backward",
        over_bytes=linchain,
        under_bytes=lora,
    )
    yield summarise(
        f"{name}/{many}-tokens",
        linchain_all / lora_all,
        note="everything saved, the products of factors included, which no token adds to",
        over_bytes=linchain_all,
        under_bytes=lora_all,
    )


class LayerPasses:
    """Forward and backward passes of one layer in the middle of a model: its input needs a gradient too.

    Args:
        layer: The layer.
        x: Its input, a leaf that requires a gradient, (…, width).
        num_passes: Passes in one unit.
    """

    def __init__(self, layer: nn.Module, x: Tensor, num_passes: int) -> None:
        self._layer = layer
        self._x = x
        self._above = torch.randn_like(x)
        self._num_passes = num_passes
        self._leaves = [x, *trainable(layer)]

    def run(self) -> None:
        """Pass forward and backward."""
        for _ in range(self._num_passes):
            self._layer(self._x).backward(self._above)
            for leaf in self._leaves:
                leaf.grad = None


class FactorByFactor(nn.Module):
    """A and the inner factors, each applied to the activations: what depth costs where the chain is not folded.

    Args:
        first: LoRA's A.
        num_inner: Number of inner factors.
    """

    def __init__(self, first: nn.Linear, num_inner: int) -> None:
        super().__init__()
        self.first = first
        square: dict[str, Any] = {"bias": False, "device": first.weight.device, "dtype": first.weight.dtype}
        self.inner = nn.Sequential(
            *(nn.Linear(first.out_features, first.out_features, **square) for _ in range(num_inner))
        )

    @property
    def weight(self) -> Tensor:
        """A, of which PEFT asks the dtype."""
        return self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, d_in) to (…, r)."""
        result: Tensor = self.inner(self.first(x))
        return result


def apply_one_by_one(model: Any, num_inner: int) -> Any:
    """Put unfolded chains into the place of each A of a LoRA model, and return it."""
    for module in list(model.modules()):
        for adapter, first in list(getattr(module, "lora_A", {}).items()):
            module.lora_A[adapter] = FactorByFactor(first, num_inner)
    return model


def adapt_layer(base: nn.Linear, method: str) -> nn.Module:
    """Return a frozen layer with an adapter, which shares the layer's weight."""
    model = adapt(nn.Sequential(base), method_config(method, target_modules=["0"]))
    layer: nn.Module = model.base_model.model[0].train()
    # B starts at 0, and a product with zeros is not slower, but what a step makes of it is what is measured.
    nn.init.normal_(layer.get_submodule("lora_B.default").weight, std=0.02)  # type: ignore[arg-type]
    return layer


def count_saved(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes that one forward pass saves for backward, each storage once, parameters left out."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = layer(x.requires_grad_())  # kept, so that no address is given out twice
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    total = sum(size for address, size in storages.items() if address not in own)
    del result
    return total
