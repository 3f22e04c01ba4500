"""Find the adapted layers of a model and describe each as a chain of factors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper, _ConvNd
from peft.tuners.lora.tp_layer import LoraParallelLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.xlora.layer import XLoraLayer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from linchain_analysis.adapters.layer import read_factors

# A subclass from elsewhere may change the weight in a way of its own, so only these are read as products.
_PRODUCT_HOMES = ("peft.tuners.lora.", "linchain_analysis.adapters.")
# Variants that start or differentiate LoRA in their own way and apply it as it is.
_PRODUCT_VARIANTS = ("MiCALinearVariant", "MiCAEmbeddingVariant", "VeloraLinearVariant")
# Parts of a dotted name that wrappers add: torch.compile, FSDP, activation checkpointing, PEFT's own layers.
_WRAPPER_PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}


@dataclass(frozen=True, eq=False)
class Factor:
    """One trainable matrix of a chain.

    Attributes:
        name: A, W1 … Wn or B; for a layer whose delta is refused, the name PEFT gives the parameter.
        parameter: The live parameter. Its first axis against all the others makes the stored matrix (p, q).
        transposed: Whether the chain view, rows = input side, is the transpose of the stored matrix, as it is for
            everything stored like `nn.Linear`.
    """

    name: str
    parameter: nn.Parameter
    transposed: bool = True

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the stored matrix."""
        return _stored_shape(self.parameter)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the chain view: (d_in, w_0), (w_{i-1}, w_i) or (w_n, d_out)."""
        p, q = self.stored_shape
        return (q, p) if self.transposed else (p, q)

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return `tensor` (the parameter, its gradient, …) as the stored matrix (p, q)."""
        return tensor.reshape(self.stored_shape)

    def view(self, tensor: Tensor) -> Tensor:
        """Return `tensor` (the parameter, its gradient, …) in chain view, the input side first."""
        matrix = self.matrix(tensor)
        return matrix.mT if self.transposed else matrix


@dataclass(frozen=True, eq=False)
class Chain:
    """The ordered factors of one adapted weight matrix under one adapter.

    Attributes:
        module: Name of the layer in the base model; `name@adapter` where the layer trains several adapters.
        kind: Last part of the name.
        layer: Index of the layer's block (the first number in the name), or None.
        adapter: Name of the adapter.
        factors: From input to output.
        refused: Why the change of the effective weight is not the product of these factors, or None.
        read_scale: Returns the present scale; NaN once the product is no longer the change of the weight, because the
            adapter was deleted or the base weight trains as well.
        adapted: The adapted layer itself.
    """

    module: str
    kind: str
    layer: int | None
    adapter: str
    factors: tuple[Factor, ...]
    refused: str | None
    read_scale: Callable[[], float]
    adapted: BaseTunerLayer | None = None

    @property
    def base_weight(self) -> Tensor | None:
        """The frozen weight under the adapter, as its layer stores it."""
        return None if self.adapted is None else _base_weight(self.adapted)

    @property
    def scale(self) -> float:
        """alpha / r, alpha / √r for rsLoRA: what multiplies the product now."""
        return self.read_scale()


def find_chains(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Chain]:
    """Return the chains of `model` that train, in the order of its modules.

    A chain trains if one of its factors requires a gradient or belongs to `optimizer`.
    """
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer else set()
    found: list[Chain] = []
    for name, layer in _named_layers(model):
        chains = [
            chain
            for adapter in _adapter_names(layer)
            if (chain := _read_layer(name, layer, adapter)) and _trains(chain, optimized)
        ]
        if len(chains) > 1:
            chains = [replace(chain, module=f"{chain.module}@{chain.adapter}") for chain in chains]
        found += chains
    return found


def choose_chains(chains: Sequence[Chain], include: str | None = None, exclude: str | None = None) -> list[Chain]:
    """Return the chains whose module's name has a match of `include` and none of `exclude`.

    Args:
        chains: Among which.
        include: A regular expression, found anywhere in the name; None for all.
        exclude: The same; None for none.
    """
    return [
        chain
        for chain in chains
        if (include is None or re.search(include, chain.module))
        and (exclude is None or not re.search(exclude, chain.module))
    ]


def _trains(chain: Chain, optimized: set[int]) -> bool:
    return any(f.parameter.requires_grad or id(f.parameter) in optimized for f in chain.factors)


def _named_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Yield each adapted layer once with its name in the base model, unique among those yielded."""
    seen: set[int] = set()
    taken: Counter[str] = Counter()
    bases = [
        (f"{name}." if name else "") + ("base_model.model." if isinstance(module, PeftModel) else "model.")
        for name, module in model.named_modules()
        if isinstance(module, (PeftModel, BaseTuner))
    ]
    for full_name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or id(module) in seen:
            continue
        seen.add(id(module))
        inside = max((base for base in bases if f"{full_name}.".startswith(base)), key=len, default="")
        parts = [part for part in full_name[len(inside) :].split(".") if part not in _WRAPPER_PARTS]
        if not inside and parts[:1] == ["module"] and isinstance(getattr(model, "module", None), nn.Module):
            parts = parts[1:]  # DataParallel and DistributedDataParallel
        if isinstance(module, ParamWrapper):
            parts.append(module.parameter_name)
        name = ".".join(parts)
        taken[name] += 1
        yield (name if taken[name] == 1 else f"{name}#{taken[name]}"), module


def _adapter_names(layer: BaseTunerLayer) -> list[str]:
    """Adapters of a layer in the order in which they were added."""
    names: dict[str, None] = {}
    for attribute in layer.adapter_layer_names:
        held = getattr(layer, attribute, None)
        if isinstance(held, (nn.ModuleDict, nn.ParameterDict)):
            names |= dict.fromkeys(held.keys())
    return list(names)


def _read_layer(name: str, layer: BaseTunerLayer, adapter: str) -> Chain | None:
    factors: tuple[Factor, ...] = ()
    kind = _own_class(layer)
    refused: str | None = f"{kind.__name__} of {kind.__module__} is not a product of LoRA factors"
    if isinstance(layer, LoraLayer) and f"{kind.__module__}.".startswith(_PRODUCT_HOMES):
        factors, refused = _product_factors(layer, adapter), _refusal(layer, adapter)
    if refused or not factors:
        read = {id(factor.parameter) for factor in factors}
        factors += tuple(f for f in _other_factors(layer, adapter) if id(f.parameter) not in read)
    if not factors:
        return None
    refused = _refuse_flat(factors) or refused
    scaling = getattr(layer, "scaling", None)
    base_weight = _base_weight(layer)

    def read_scale() -> float:
        if not isinstance(scaling, dict):
            return 1.0
        holds = adapter in scaling and not (base_weight is not None and base_weight.requires_grad)
        return float(scaling[adapter]) if holds else float("nan")

    parts = name.split(".")
    block = next((int(part) for part in parts if part.isdigit()), None)
    return Chain(name, parts[-1], block, adapter, factors, refused, read_scale, layer)


def _own_class(layer: nn.Module) -> type:
    """The class of a layer before torch shards or replicates it: `fully_shard` puts a subclass of its own over it."""
    kind = type(layer)
    while kind.__bases__[0].__module__.startswith("torch.distributed."):
        kind = kind.__bases__[-1]
    return kind


def _product_factors(layer: LoraLayer, adapter: str) -> tuple[Factor, ...]:
    """A, W1 … Wn, B of a LoRA or LinChain layer; empty where the layer keeps its weights in another way."""
    if adapter not in layer.lora_A and adapter not in layer.lora_embedding_A:
        return ()
    return tuple(Factor(*named) for named in read_factors(layer, adapter))


def _refusal(layer: LoraLayer, adapter: str) -> str | None:
    """Why s · A W1 … Wn B is not the change of this layer's effective weight, or None where it is."""
    if layer.use_dora.get(adapter):
        return "DoRA rescales the columns of the whole weight, so its change is not a product of factors"
    variant = type(layer.lora_variant.get(adapter)).__name__
    if variant not in ("NoneType", *_PRODUCT_VARIANTS):
        return f"{variant.removesuffix('Variant')} changes more than a product of factors"
    # Routers weigh the products of several adapters, these without a variant of their own.
    if any(type(other).__name__ == "ArrowLinearVariant" for other in layer.lora_variant.values()):
        return "Arrow weighs its product anew for every token"
    if isinstance(getattr(layer.forward, "__self__", None), XLoraLayer):
        return "X-LoRA weighs its product anew for every token"
    if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
        return f"{layer.parameter_name} holds {layer.num_experts} experts, so its change is not one product of factors"
    base = layer.get_base_layer()
    if isinstance(layer, LoraParallelLinear) or getattr(base, "_hf_tp_plan", None) is not None:
        return "tensor parallelism splits its factors, of which this process holds a part"
    if isinstance(base, NonDynamicallyQuantizableLinear):
        # `nn.MultiheadAttention` reads this layer's weight and never calls it. PEFT 0.21 merges around each call.
        return "PEFT adds the product to an output projection inside nn.MultiheadAttention twice (or never, by itself)"
    if isinstance(layer, _ConvNd) and base.groups > 1:
        return f"a convolution in {base.groups} groups changes block by block, not by one product of factors"
    weight = _base_weight(layer)
    if weight is not None and weight.requires_grad:
        return "its base weight trains as well, so the factors are not the whole change"
    return None


def _refuse_flat(factors: Sequence[Factor]) -> str | None:
    """Why what this process holds of these factors are no matrices, or None where they are."""
    keeper = next((found for factor in factors if (found := name_flattening(factor.parameter))), None)
    return keeper and f"{keeper} keeps its factors in flat pieces on several processes"


def name_flattening(parameter: Tensor) -> str | None:
    """Name what keeps `parameter` in flat pieces on several processes, not as a `DTensor`; None where nothing does."""
    if hasattr(parameter, "ds_id"):
        return "DeepSpeed ZeRO-3"
    # Marks of torch.distributed.fsdp.FullyShardedDataParallel; `fully_shard` leaves none.
    if type(parameter).__name__ == "FlatParameter" or getattr(parameter, "_fsdp_flattened", False):
        return "FullyShardedDataParallel (FSDP1; fully_shard does not)"
    return None


def _base_weight(layer: BaseTunerLayer) -> Tensor | None:
    weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"), None)
    return weight if isinstance(weight, Tensor) else None


def _other_factors(layer: BaseTunerLayer, adapter: str) -> tuple[Factor, ...]:
    """Every parameter that `adapter` has on this layer, under the name PEFT gives it."""
    factors = []
    for attribute in dict.fromkeys(layer.adapter_layer_names):
        held = getattr(layer, attribute, None)
        if not isinstance(held, (nn.ModuleDict, nn.ParameterDict)) or adapter not in held:
            continue
        item = held[adapter]
        named = [("", item)] if isinstance(item, nn.Parameter) else list(item.named_parameters())
        for suffix, parameter in named:
            name = attribute if suffix in ("", "weight") else f"{attribute}.{suffix}"
            factors.append(Factor(name, parameter))
    return tuple(factors)


def _stored_shape(parameter: Tensor) -> tuple[int, int]:
    shape = tuple(parameter.shape)
    if len(shape) < 2:
        return (1, parameter.numel())
    return (shape[0], parameter.numel() // shape[0] if shape[0] else 0)
