"""LinChain as a PEFT method: LoRA whose A is followed by a chain of trainable inner factors."""

from __future__ import annotations

from linchain_analysis.adapters.config import LinChainConfig
from linchain_analysis.adapters.export import fold_to_lora
from linchain_analysis.adapters.layer import read_factors
from linchain_analysis.adapters.methods import method_config
from linchain_analysis.adapters.registration import register
from linchain_analysis.adapters.tuner import LinChainModel

__all__ = ["LinChainConfig", "LinChainModel", "fold_to_lora", "method_config", "read_factors"]

register()
