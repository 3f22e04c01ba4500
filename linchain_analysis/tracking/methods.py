"""The name of the method that a model is adapted by, for runs whose owner did not say."""

from __future__ import annotations

from typing import Any

from torch import nn


def name_method(model: nn.Module) -> str | None:
    """Return a name such as `lora-16` or `linchain-3-16`, or None where the model says nothing of the kind."""
    config = next((found for module in model.modules() if (found := _config(module)) is not None), None)
    if config is None:
        return None
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    rank = getattr(config, "r", None)
    if kind == "linchain":
        return _name_chain(config, rank)
    parts = [kind] if rank is None else [kind, str(rank)]
    init = getattr(config, "init_lora_weights", True)
    if getattr(config, "use_rslora", False):
        parts.append("rslora")
    if getattr(config, "use_dora", False):
        parts.append("dora")
    if isinstance(init, str):
        parts.append(init.lower())
    return "-".join(parts)


def _config(module: nn.Module) -> Any:
    configs = getattr(module, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return None
    active = getattr(module, "active_adapter", None)
    return (
        configs.get(active, next(iter(configs.values()))) if isinstance(active, str) else next(iter(configs.values()))
    )


def _name_chain(config: Any, rank: Any) -> str:
    name = f"linchain-{config.chain_length}-{rank}"
    if config.chain_length == 1:
        name = f"moslora-{rank}"
    width = config.chain_width
    # The plain name of linchain-2-8 means the paper's 8→16→8.
    usual = 16 if (config.chain_length, rank) == (2, 8) else rank
    if (width or rank) != usual:
        name += f"-w{width or rank}"
    return name if config.chain_init == "kaiming" else f"{name}-{config.chain_init}"
