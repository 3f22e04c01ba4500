"""The name of the method that a model is adapted by, for runs whose owner did not say."""

from __future__ import annotations

from typing import Any

from torch import nn

from linchain_analysis.adapters.methods import method_name


def name_method(model: nn.Module) -> str | None:
    """Return a name such as `lora-16` or `linchain-3-16`, or None where the model says nothing of the kind."""
    config = next((found for module in model.modules() if (found := _config(module)) is not None), None)
    return None if config is None else method_name(vars(config))


def _config(module: nn.Module) -> Any:
    configs = getattr(module, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return None
    active = getattr(module, "active_adapter", None)
    return (
        configs.get(active, next(iter(configs.values()))) if isinstance(active, str) else next(iter(configs.values()))
    )
