"""LinChain as a PEFT tuner: LoRA's, with a chain put where A was."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, MultiheadAttention, ParamWrapper, _ConvNd
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from linchain_analysis.adapters.chain import ConvFactorChain, FactorChain, InnerFactors
from linchain_analysis.adapters.config import LinChainConfig
from linchain_analysis.adapters.folding import folded_adapters
from linchain_analysis.adapters.initialisation import draw_inner_factors, seed_from
from linchain_analysis.adapters.layer import ChainEmbedding, ChainLinear
from linchain_analysis.errors import UnsupportedError


class LinChainModel(LoraModel):  # type: ignore[misc]
    """LoRA's tuner, except that each new adapter's A becomes a chain of factors.

    Args, attributes and everything not defined here are those of `peft.LoraModel`.
    """

    def _create_and_replace(
        self,
        lora_config: LinChainConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        # PEFT adds the adapter to a layer that is there, except that it nests one parameter's wrapper in another's.
        is_nested = isinstance(target, ParamWrapper) and adapter_name in target.lora_A
        is_adapted = isinstance(target, LoraLayer) and not is_nested
        if parameter_name is not None:
            _refuse_experts(getattr(base, parameter_name), current_key)
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
        )
        if getattr(base, "_hf_tp_plan", None) is not None:
            raise UnsupportedError(
                current_key,
                expected="a layer that is not sharded by tensor parallelism",
                got=f"the plan {base._hf_tp_plan!r}",
                do="load the model without tp_plan, or use peft.LoraConfig",
            )
        layer = target if is_adapted else getattr(parent, target_name)
        rank_key = get_pattern_key(lora_config.rank_pattern.keys(), current_key)
        widths = lora_config.widths(lora_config.rank_pattern.get(rank_key, lora_config.r))
        tied = target_name in (getattr(lora_config, "target_modules_to_tie", None) or ())
        source = self.model.get_input_embeddings() if tied else None
        for part in _chained_layers(layer):
            _put_chain(part, adapter_name, widths, lora_config.chain_init, source)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Combine adapters as `peft.LoraModel.add_weighted_adapter` does; the new adapter is a plain LoRA.

        The adapters take part with their chains folded, so `svd` and `cat` are as exact as for LoRA, and the methods
        that combine factor by factor (`linear`, `ties`, …) see A W1 … Wn and B.
        """
        with folded_adapters(self, adapters):
            super().add_weighted_adapter(adapters, *args, **kwargs)


def _refuse_experts(parameter: Tensor, place: str) -> None:
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if len(shape) == 3 and shape[0] > 1:
        raise UnsupportedError(
            place,
            expected="a parameter of two dimensions",
            got=f"{shape[0]} experts in one parameter of shape {shape}",
            do="leave it out of target_parameters, or use peft.LoraConfig",
        )


def _chained_layers(layer: LoraLayer) -> list[LoraLayer]:
    if isinstance(layer, MultiheadAttention):  # adapts its output projection in a layer of its own
        return [layer, layer.base_layer.out_proj]
    return [layer]


def _put_chain(
    layer: LoraLayer, adapter: str, widths: tuple[int, ...], init: str, tied_to: ChainEmbedding | None
) -> None:
    """Replace the LoRA factor A of `adapter` by a chain of `widths` that starts with it; for n = 0 leave it alone."""
    if isinstance(layer, Embedding):
        _put_embedding_chain(layer, adapter, widths, init)
        return
    # A layer class that the user registered with PEFT for a module of their own may keep its factors elsewhere.
    if adapter not in layer.lora_A:
        return
    _adopt(layer)
    if len(widths) == 1:
        return
    module = layer.lora_A[adapter]
    if tied_to is not None:
        # The tied head is the transposed embedding, and so are its factors: they share the embedding's memory.
        embedding_inner = cast(InnerFactors, tied_to.lora_embedding_W[adapter]).inner_factors()
        inner = [factor.data.t() for factor in reversed(embedding_inner)]
    else:
        inner = _start_inner(widths, init, like=module.weight, drawn=module.weight)
    if isinstance(layer, _ConvNd):
        layer.lora_A[adapter] = ConvFactorChain(module, inner)
    else:
        layer.lora_A[adapter] = FactorChain(module.weight.data, inner, module.weight.requires_grad)


def _put_embedding_chain(layer: Embedding, adapter: str, widths: tuple[int, ...], init: str) -> None:
    if len(widths) > 1:
        _adopt(layer)
        # LoRA starts A at zero here (a row of it is touched only when its token comes by) and draws B.
        first, last = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        inner = _start_inner(widths, init, like=first, drawn=last)
        layer.lora_embedding_W[adapter] = InnerFactors(inner, first.requires_grad)
    elif adapter in getattr(layer, "lora_embedding_W", ()):  # left by a deeper adapter of the same name
        del layer.lora_embedding_W[adapter]


def _start_inner(widths: tuple[int, ...], init: str, like: Tensor, drawn: Tensor) -> list[Tensor]:
    if like.is_meta:
        return [torch.empty(fan_out, fan_in, device="meta", dtype=like.dtype) for fan_in, fan_out in pairwise(widths)]
    return [factor.to(like.device, like.dtype) for factor in draw_inner_factors(widths, init, seed_from(drawn))]


def _adopt(layer: LoraLayer) -> None:
    """Give PEFT's own layers the methods that know chains.

    PEFT decides which layer a module gets by asking a list of backends in turn, and may find a layer that is there
    already. Changing the class of what comes out leaves both to PEFT; layers of quantised backends keep theirs.
    """
    if type(layer) is Linear:
        layer.__class__ = ChainLinear
    elif type(layer) is Embedding:
        layer.__class__ = ChainEmbedding
        cast(ChainEmbedding, layer).lora_embedding_W = nn.ModuleDict()
