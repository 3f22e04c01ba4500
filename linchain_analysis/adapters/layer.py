"""PEFT's LoRA layers with a chain inside."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer
from torch import Tensor, nn

from linchain_analysis.adapters.chain import FactorChain, InnerFactors, without_autocast
from linchain_analysis.adapters.fused import as_rows, fused_linear, is_hooked

# What PEFT hands to its own layers and not to the base layer.
_OPTIONS = ("adapter_names", "alora_offsets")


class ChainLinear(Linear):  # type: ignore[misc]
    """LoRA's linear layer with a forward that pays for depth once per call instead of once per token."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return x W + bias + scale · x A W1 … Wn B, (…, d_out).

        In the plain case the small product and the scale are folded into the smaller of A and B, and the sum with the
        base output is formed in place, or where that is not safe by one `addmm`. Either keeps no more for backward
        than LoRA: x, x A and small matrices.
        """
        adapter = self._plain_adapter(kwargs)
        if adapter is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        options = {name: value for name, value in kwargs.items() if name not in _OPTIONS}
        first, last = self._fold(adapter)
        dropout = self.lora_dropout[adapter]
        fused = None if args or options else fused_linear(self.base_layer, dropout, x, first, last)
        if fused is not None:
            return fused
        base: Tensor = self.base_layer(x, *args, **options)
        hidden = F.linear(dropout(self._cast_input_dtype(x, first.dtype)), first)
        if base.dtype != hidden.dtype:
            # The dtypes promote as in LoRA: the sum is formed in the wider one and rounded once.
            return (base + F.linear(hidden, last)).to(base.dtype)
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return base + F.linear(hidden, last)  # a compiler fuses this, and rows counted now would be rows for ever
        return torch.addmm(as_rows(base), as_rows(hidden), last.t()).view(base.shape)

    def _fold(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return the chain as two factors, (r, d_in) and (d_out, r): scale and inner product go into the smaller."""
        chain, last, scale = self.lora_A[adapter], self.lora_B[adapter].weight, self.scaling[adapter]
        folds_first = self.in_features <= self.out_features
        if not isinstance(chain, FactorChain):
            first = chain.weight
            return (first * scale, last) if folds_first else (first, last * scale)
        product = chain.inner_product(scale)
        if folds_first:
            return chain.fold_first(product), last
        with without_autocast(last.device.type):
            return chain.A, last @ product

    def _plain_adapter(self, kwargs: dict[str, Any]) -> str | None:
        """Return the adapter if there is just one to apply and nothing else to do, or None."""
        if any(kwargs.get(name) is not None for name in _OPTIONS):
            return None
        if self.disable_adapters or self.merged:
            return None
        present = [name for name in self.active_adapters if name in self.lora_A]
        if len(present) != 1 or present[0] in self.lora_variant or self.lora_bias[present[0]]:
            return None
        chain, last = self.lora_A[present[0]], self.lora_B[present[0]]
        is_plain = type(chain) in (FactorChain, nn.Linear) and not (is_hooked(chain) or is_hooked(last))
        return present[0] if is_plain else None


class ChainEmbedding(Embedding):  # type: ignore[misc]
    """LoRA's embedding with a chain: A stays `lora_embedding_A`, B `lora_embedding_B`, W1 … Wn `lora_embedding_W`."""

    adapter_layer_names = (*Embedding.adapter_layer_names, "lora_embedding_W")
    lora_embedding_W: nn.ModuleDict

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return delta of `adapter`, shape (num_embeddings, embedding_dim)."""
        first, last = self.lora_embedding_A[adapter], self._folded_last(adapter)
        dtype = first.dtype
        if first.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            first, last = first.float(), last.float()
        delta: Tensor = (last @ first).t() * self.scaling[adapter]
        return delta.to(dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the embeddings of the indices `x`, (…, embedding_dim)."""
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        kwargs.pop("alora_offsets", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            untouched: Tensor = self.base_layer(x, *args, **kwargs)
            return untouched
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        base: Tensor = self.base_layer(x, *args, **kwargs)
        result = base
        for adapter in self.active_adapters:
            if adapter in self.lora_embedding_A:
                result = result + self._embed_delta(x, adapter)
        return result.to(base.dtype)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in set(adapter_names):
            if adapter in self.lora_embedding_A:
                rows = [index for index, name in enumerate(adapter_names) if name == adapter]
                result[rows] += self._embed_delta(x[rows], adapter)
        return result

    def _embed_delta(self, x: Tensor, adapter: str) -> Tensor:
        hidden = self._embed(x, self.lora_embedding_A[adapter].t())
        delta: Tensor = F.linear(hidden, self._folded_last(adapter, self.scaling[adapter]))
        # Some models scale their embeddings inside the layer, so the change has to be scaled with them.
        embed_scale = self._get_embed_scale()
        return delta if embed_scale is None else delta * embed_scale.to(delta.dtype)

    def _folded_last(self, adapter: str, scale: float = 1.0) -> Tensor:
        """Return scale · B Wn … W1, (embedding_dim, r): B is the small side, A has a column for every token."""
        last: Tensor = self.lora_embedding_B[adapter]
        if adapter not in self.lora_embedding_W:
            return last * scale
        inner = cast(InnerFactors, self.lora_embedding_W[adapter])
        with without_autocast(last.device.type):
            return last @ inner.inner_product(scale)


def read_factors(layer: LoraLayer, adapter: str) -> list[tuple[str, nn.Parameter, bool]]:
    """Return the factors A, W1 … Wn, B of a LoRA or LinChain layer as (name, parameter, transposed).

    `transposed` is as in `InnerFactors.chain_factors`.
    """
    if adapter in layer.lora_A:
        first = layer.lora_A[adapter]
        start = first.chain_factors() if isinstance(first, FactorChain) else [("A", first.weight, True)]
        return [*start, ("B", layer.lora_B[adapter].weight, True)]
    inner = getattr(layer, "lora_embedding_W", {})
    middle = inner[adapter].chain_factors() if adapter in inner else []
    return [("A", layer.lora_embedding_A[adapter], True), *middle, ("B", layer.lora_embedding_B[adapter], True)]
