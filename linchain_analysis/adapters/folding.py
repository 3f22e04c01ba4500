"""Put LoRA's own modules around the product of a chain: A' = A W1 … Wn, the same delta with two factors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, _ConvNd
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from linchain_analysis.adapters.chain import ConvFactorChain, FactorChain, InnerFactors
from linchain_analysis.adapters.layer import ChainEmbedding, ChainLinear


@contextmanager
def folded_adapters(tuner: BaseTuner, adapters: Sequence[str]) -> Iterator[None]:
    """Let the adapters of `tuner` be ordinary LoRA, chains of length 0, for a while."""
    configs = {name: tuner.peft_config[name] for name in adapters if name in tuner.peft_config}
    kept = [(layer, name, _factor_holders(layer, name)) for layer in lora_layers(tuner.model) for name in configs]
    try:
        for name, config in configs.items():
            tuner.peft_config[name] = dataclasses.replace(config, chain_length=0, chain_width=None)
        for layer, name, _ in kept:
            fold_layer(layer, name, keep_class=True)
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


def fold_layer(layer: LoraLayer, adapter: str, keep_class: bool = False) -> None:
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


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Return the adapted layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
