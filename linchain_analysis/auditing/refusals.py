"""Which saved adapters change a weight by something else than the product of their factors, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

CHAIN_TYPES = ("LORA", "LINCHAIN")

_TITLES = {
    "ADALORA": "AdaLoRA",
    "BOFT": "BOFT",
    "IA3": "(IA)³",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "OFT": "OFT",
    "RANDLORA": "RandLoRA",
    "VBLORA": "VB-LoRA",
    "VERA": "VeRA",
    "XLORA": "X-LoRA",
}
# Of LoRA's initialisations these leave the base weight alone and the first product at zero.
_ZERO_STARTS = ("true", "gaussian", "eva", "mica")
_OTHER_STARTS = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "loftq": "LoftQ",
    "orthogonal": "the orthogonal initialisation",
    "false": "init_lora_weights=False, random factors",
}
_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")
# Options that make the forward pass more than W0 + s A W1 … B. VeLoRA is not among them: it changes only gradients.
_VARIANTS = {
    "use_dora": "DoRA rescales the columns of the whole weight",
    "use_qalora": "QALoRA pools the inputs before A",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "monteclora_config": "MonteCLoRA draws its factors",
    "alora_invocation_tokens": "aLoRA changes only the tokens after its invocation",
    "arrow_config": "Arrow mixes several adapters token by token",
    "kasa_config": "KaSA truncates the base weight and scales between the factors",
}


def find_refusal(config: Mapping[str, Any], keys: Collection[str]) -> str | None:
    """Return why the change of the effective weight since training began is not the saved product, or None.

    Args:
        config: What `adapter_config.json` says.
        keys: Names of the saved tensors.
    """
    kind = str(config["peft_type"])
    if kind not in CHAIN_TYPES:
        return f"{_TITLES.get(kind, kind)} is not a product of LoRA factors"
    for option, reason in _VARIANTS.items():
        if config.get(option):
            return f"{reason}, so its change is not a product of factors"
    if any("lora_magnitude_vector" in key for key in keys):
        return f"{_VARIANTS['use_dora']}, so its change is not a product of factors"
    start = str(config.get("init_lora_weights", True)).lower()
    if start in _ZERO_STARTS:
        return None
    name = next((title for known, title in _OTHER_STARTS.items() if start.startswith(known)), repr(start))
    reason = f"it started from {name}, whose first product is not zero: the saved product is not the change since then"
    if start.startswith(_CONVERTIBLE):
        reason += " (save_pretrained with path_initial_model_for_weight_conversion saves the change)"
    return reason


def find_other_changes(config: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, ...]:
    """Return what an adapter of chains changes beyond them.

    Args:
        config: What `adapter_config.json` says.
        keys: Names of the saved tensors that are no factors.
    """
    found: dict[str, list[str]] = {}
    for key in keys:
        if key.endswith(".base_layer.weight"):
            continue  # PEFT's copy of an embedding that was adapted; the weight itself did not train
        if "lora_magnitude_vector" in key:
            kind = "magnitudes"
        elif key.endswith(".bias"):
            kind = "biases of the factors" if ".lora_" in key else "biases"
        elif "trainable_tokens_delta" in key:
            kind = "rows of embeddings"
        elif ".lora_" in key:
            kind = "further parameters of the adapter"
        else:
            kind = "whole modules"
        found.setdefault(kind, []).append(key)
    said = [f"{kind} ({len(names)}: {', '.join(_shorten(names))})" for kind, names in found.items()]
    if config.get("modules_to_save") and "whole modules" not in found:
        said.append(f"modules_to_save={config['modules_to_save']}, of which the file holds nothing")
    return tuple(said)


def _shorten(keys: list[str], shown: int = 2) -> list[str]:
    names = [key.removeprefix("base_model.model.") for key in keys[:shown]]
    return names if len(keys) <= shown else [*names, "…"]
