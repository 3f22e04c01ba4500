"""Export of a chain as an ordinary LoRA."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, cast

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from torch import nn

from linchain_analysis.adapters.config import LinChainConfig
from linchain_analysis.adapters.folding import fold_layer, lora_layers
from linchain_analysis.adapters.tuner import LinChainModel
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
    for layer in lora_layers(folded):
        fold_layer(layer, name)
    configs = _configs(folded)
    configs[name] = lora_config_of(configs[name])
    for module in folded.modules():
        if type(module) is LinChainModel:
            module.__class__ = LoraModel
        elif isinstance(module, PeftModel):
            module.peft_type = configs[name].peft_type
    return folded


def lora_config_of(config: LinChainConfig) -> LoraConfig:
    """Return the `LoraConfig` with the options of `config`, without those of the chain."""
    names = {option.name for option in dataclasses.fields(LoraConfig) if option.init} - {"peft_type"}
    plain = LoraConfig(**{name: copy.deepcopy(getattr(config, name)) for name in names})
    for name in ("modules_to_tie", "target_modules_to_tie"):  # found by PEFT when the model was made
        if hasattr(config, name):
            setattr(plain, name, copy.deepcopy(getattr(config, name)))
    return plain


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
    merged = sorted({name for layer in lora_layers(model) for name in layer.merged_adapters})
    if merged:
        raise InputError(
            "fold_to_lora", expected="no merged adapters", got=", ".join(merged), do="call unmerge_adapter() first"
        )
    return adapter_name


def _shared_tensors(model: nn.Module) -> dict[int, Any]:
    """Memo for `copy.deepcopy` under which every tensor outside the adapters is itself and not a copy."""
    adapted = {id(p) for layer in lora_layers(model) for name, p in layer.named_parameters() if "lora_" in name}
    tensors = [*model.parameters(), *model.buffers()]
    return {id(tensor): tensor for tensor in tensors if id(tensor) not in adapted}
