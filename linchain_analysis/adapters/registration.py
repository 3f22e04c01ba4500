"""Make LinChain known to PEFT."""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from linchain_analysis.adapters.config import LinChainConfig
from linchain_analysis.adapters.peft_type import LINCHAIN
from linchain_analysis.adapters.tuner import LinChainModel


def register() -> None:
    """Enter the method in PEFT's tables, once; PEFT itself refuses a second time."""
    if PeftType(LINCHAIN) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(
            name=LINCHAIN.lower(), config_cls=LinChainConfig, model_cls=LinChainModel, prefix=LinChainModel.prefix
        )
