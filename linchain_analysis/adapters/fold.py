"""A chain folded into an ordinary LoRA: A' = A W1 … Wn, the same delta with two factors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, _ConvNd
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from linchain_analysis.adapters.chain import ConvFactorChain, FactorChain, InnerFactors
from linchain_analysis.adapters.config import LinChainConfig
from linchain_analysis.adapters.layer import ChainEmbedding, ChainLinear
from linchain_analysis.errors import InputError


def fold_to_lora(model: nn.Module, adapter_name: str | None = None, *, copy_base: bool = True) -> nn.Module:
    """Return a copy of `model` in which one LinChain adapter is an ordinary PEFT LoRA with the same delta.

    The copy holds only that adapter, under its name; `save_pretrained` on it writes an adapter that PEFT loads without
    this package. The product is formed in float64 and stored in the factors' dtype, at least float32, so delta agrees
    to one rounding of A'.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected (transformers' `add_adapter`).
        adapter_name: Adapter to fold; None means the active one.
        copy_base: Whether to copy the base weights too. Without, they are shared with `model` and need no memory, but
            merging one model then changes the other.

    Raises:
        InputError: There is no such adapter, several are active, it is not LinChain, or adapters are merged.
    """
    name = _adapter_to_fold(model, adapter_name)
    folded = copy.deepcopy(model, None if copy_base else _shared_tensors(model))
    for other in [other for other in _configs(folded) if other != name]:
        cast(Any, folded).delete_adapter(other)
    for layer in _lora_layers(folded):
        _fold_layer(layer, name)
    for module in folded.modules():
        if type(module).__name__ == "LinChainModel":
            module.__class__ = LoraModel
    configs = _configs(folded)
    configs[name] = lora_config_of(configs[name])
    return folded


def lora_config_of(config: LinChainConfig) -> LoraConfig:
    """Return the `LoraConfig` with the options of `config`, without those of the chain."""
    names = {option.name for option in dataclasses.fields(LoraConfig) if option.init} - {"peft_type"}
    plain = LoraConfig(**{name: copy.deepcopy(getattr(config, name)) for name in names})
    for name in ("modules_to_tie", "target_modules_to_tie"):  # found by PEFT when the model was made
        if hasattr(config, name):
            setattr(plain, name, copy.deepcopy(getattr(config, name)))
    return plain


@contextmanager
def folded_adapters(tuner: BaseTuner, adapters: Sequence[str]) -> Iterator[None]:
    """Let the adapters of `tuner` be ordinary LoRA, chains of length 0, for a while."""
    configs = {name: tuner.peft_config[name] for name in adapters if name in tuner.peft_config}
    kept = [(layer, name, _factor_holders(layer, name)) for layer in _lora_layers(tuner.model) for name in configs]
    try:
        for name, config in configs.items():
            tuner.peft_config[name] = dataclasses.replace(config, chain_length=0, chain_width=None)
        for layer, name, _ in kept:
            _fold_layer(layer, name, keep_class=True)
        yield
    finally:
        tuner.peft_config.update(configs)
        for _, name, holders in kept:
            for holder, value in holders:
                holder[name] = value


def _factor_holders(layer: LoraLayer, adapter: str) -> list[tuple[Any, Any]]:
    """Every dictionary of the layer that holds factors of `adapter`, with what it holds."""
    names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_embedding_W")
    holders = [getattr(layer, name) for name in names if hasattr(layer, name)]
    return [(holder, holder[adapter]) for holder in holders if adapter in holder]


def _fold_layer(layer: LoraLayer, adapter: str, keep_class: bool = False) -> None:
    """Replace the chain of `adapter` by LoRA's own module around the product, and the layer's class by LoRA's own."""
    if isinstance(layer, ChainEmbedding) and adapter in layer.lora_embedding_W:
        first, last = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        product = _exact_product(cast(InnerFactors, layer.lora_embedding_W.pop(adapter)), first)
        layer.lora_embedding_A[adapter] = nn.Parameter(product, requires_grad=first.requires_grad)
        layer.lora_embedding_B[adapter] = nn.Parameter(_widened(last), requires_grad=last.requires_grad)
    elif adapter in layer.lora_A and isinstance(layer.lora_A[adapter], FactorChain):
        chain, last = layer.lora_A[adapter], layer.lora_B[adapter]
        first = chain.A
        layer.lora_A[adapter] = _plain_module(layer, chain, _exact_product(chain, first), first.requires_grad)
        if last.weight.dtype != _widened(last.weight).dtype:
            layer.lora_B[adapter] = copy.deepcopy(last).to(torch.float32)
    if not keep_class:
        if type(layer) is ChainLinear:
            layer.__class__ = Linear
        elif type(layer) is ChainEmbedding:
            del layer.lora_embedding_W
            layer.__class__ = Embedding


def _exact_product(inner: InnerFactors, first: Tensor) -> Tensor:
    """Return Wn … W1 A in the shape of A, formed in float64."""
    product = first.detach().double().flatten(1)
    for factor in inner.inner_factors():
        product = factor.detach().double() @ product
    return product.to(_widened(first).dtype).view(first.shape)


def _widened(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32 if it is in a shorter type, where a product of factors cannot be stored exactly."""
    return tensor.detach().float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.detach()


def _plain_module(layer: LoraLayer, chain: FactorChain, weight: Tensor, requires_grad: bool) -> nn.Module:
    module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    if isinstance(chain, ConvFactorChain):
        assert isinstance(layer, _ConvNd)
        base = layer.get_base_layer()
        module = type(base)(
            weight.shape[1], weight.shape[0], base.kernel_size, base.stride, base.padding, bias=False, device="meta"
        )
    else:
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=requires_grad)
    return module


def _lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _configs(model: nn.Module) -> dict[str, Any]:
    """Configurations by adapter name; the dictionary that PEFT and the model themselves use."""
    return cast(dict[str, Any], getattr(model, "peft_config", {}))


def _adapter_to_fold(model: nn.Module, adapter_name: str | None) -> str:
    configs = _configs(model)
    if adapter_name is None:
        active = getattr(model, "active_adapters", ())
        names = list(active() if callable(active) else active)
        if len(names) != 1:
            raise InputError(
                "fold_to_lora", expected="one active adapter", got=repr(names), do="name the one to fold: adapter_name"
            )
        adapter_name = names[0]
    if not isinstance(configs.get(adapter_name), LinChainConfig):
        known = [name for name, config in configs.items() if isinstance(config, LinChainConfig)]
        raise InputError(
            "fold_to_lora",
            expected=f"the name of a LinChain adapter ({', '.join(known) or 'the model has none'})",
            got=repr(adapter_name),
            do="pass a model made with a LinChainConfig and one of its adapters",
        )
    merged = sorted({name for layer in _lora_layers(model) for name in layer.merged_adapters})
    if merged:
        raise InputError(
            "fold_to_lora", expected="no merged adapters", got=", ".join(merged), do="call unmerge_adapter() first"
        )
    return adapter_name


def _shared_tensors(model: nn.Module) -> dict[int, Any]:
    """Memo for `copy.deepcopy` under which every tensor outside the adapters is itself and not a copy."""
    adapted = {id(p) for layer in _lora_layers(model) for name, p in layer.named_parameters() if "lora_" in name}
    tensors = [*model.parameters(), *model.buffers()]
    return {id(tensor): tensor for tensor in tensors if id(tensor) not in adapted}
